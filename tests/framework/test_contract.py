"""The contract: every exported name does the same with both providers, side by side in one process, and what
Detectron2 did when the golden values were taken, on machines that have none."""

import json
from pathlib import Path

import observations
import pooler_cases
import pytest
import torch
from providers import BUILTIN, detectron2_provider

import dfm_d2.framework
from dfm_d2.framework._config_files import unused_keys
from dfm_d2.framework._providers import PLACES

OURS = {"PROVIDER", "merge_config_file", "merge_config_opts"}
GOLDEN = Path(__file__).parent / "golden"
# What is worth a golden value but belongs to torch or NumPy may move in its last digits between versions.
GOLDEN_TOLERANCE = 2e-4
WITH_GOLDEN = {**observations.BY_NAME, **observations.BACKBONES}
ALL = {**WITH_GOLDEN, **observations.LIVE_ONLY}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _golden(*names: str) -> dict:
    return {k: v for name in names for k, v in json.loads((GOLDEN / f"{name}.json").read_text()).items()}


def _check(seen, wanted, tolerance: float) -> None:
    assert not observations.differences(observations.as_json(seen), wanted, tolerance)


@pytest.mark.parametrize("name", sorted(WITH_GOLDEN))
def test_builtin_does_what_detectron2_did(name):
    _check(WITH_GOLDEN[name](BUILTIN), _golden("names", "backbones")[name], GOLDEN_TOLERANCE)


@pytest.mark.d2
@pytest.mark.parametrize("name", sorted(ALL))
def test_builtin_does_what_detectron2_does(name):
    wanted = observations.as_json(ALL[name](detectron2_provider()))
    _check(ALL[name](BUILTIN), wanted, 1e-6)


@pytest.mark.parametrize("name", sorted(pooler_cases.CASES))
def test_our_reference_pools_as_the_pooler_of_detectron2(name):
    from dfm_kernels.multilevel_roi_align import multilevel_roi_align

    output_size, sampling_ratio = pooler_cases.CASES[name]
    pooled = multilevel_roi_align(
        pooler_cases.features(), pooler_cases.boxes_xyxy(), pooler_cases.SCALES, output_size, sampling_ratio
    )
    _check(pooler_cases.summary(pooled), _golden("pooler")[name], GOLDEN_TOLERANCE)


def test_golden_files_are_small():
    assert sum(path.stat().st_size for path in GOLDEN.glob("*.json")) < 200_000


@pytest.mark.d2
def test_the_builtin_knows_every_key_of_detectron2():
    wanted = observations.as_json(observations.unused_config_keys(detectron2_provider()))
    absent = unused_keys().keys() - wanted.keys()
    assert absent <= observations.LATER_KEYS.keys()
    assert {key: value for key, value in unused_keys().items() if key not in absent} == wanted


def test_every_exported_name_is_observed():
    assert set(observations.BY_NAME) == set(PLACES) == set(dfm_d2.framework.__all__) - OURS
    assert len(dfm_d2.framework.__all__) == len(set(dfm_d2.framework.__all__))
