"""The builtin subset against golden values of the real Detectron2, on machines that have none."""

import json
from pathlib import Path

import observations
import pooler_cases
import pytest
import torch

from dfm_d2.framework import _builtin

GOLDEN = Path(__file__).parent / "golden"
# What is worth a golden value but belongs to torch or NumPy may move in its last digits between versions.
TOLERANCE = 2e-4


def _golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def _check(seen, wanted) -> None:
    assert not observations.differences(observations.as_json(seen), wanted, TOLERANCE)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(observations.BY_NAME))
def test_name(name):
    _check(observations.BY_NAME[name](_builtin), _golden("names")[name])


@pytest.mark.parametrize("name", sorted(observations.BACKBONES))
def test_backbone(name):
    _check(observations.BACKBONES[name](_builtin), _golden("backbones")[name])


@pytest.mark.parametrize("name", sorted(pooler_cases.CASES))
def test_pooler(name):
    """Our reference pools as Detectron2's ROIPooler does."""
    from dfm_kernels.multilevel_roi_align import multilevel_roi_align

    output_size, sampling_ratio = pooler_cases.CASES[name]
    pooled = multilevel_roi_align(
        pooler_cases.features(), pooler_cases.boxes_xyxy(), pooler_cases.SCALES, output_size, sampling_ratio
    )
    _check(pooler_cases.summary(pooled), _golden("pooler")[name])


def test_golden_files_are_small():
    assert sum(path.stat().st_size for path in GOLDEN.glob("*.json")) < 200_000
