"""The contract: every exported name does the same with both providers, side by side in one process, and what
Detectron2 did when the golden values were taken, on machines that have none."""

import json
from pathlib import Path

import observations
import pytest
import torch
from observations import LIVE, WITH_GOLDEN, as_json, differences
from providers import BUILTIN, detectron2_provider

import dfm_d2.framework
from dfm_d2.framework._config_files import unused_keys
from dfm_d2.framework._providers import PLACES

OURS = {"PROVIDER", "merge_config_file", "merge_config_opts"}
FILES = [Path(__file__).parent / "golden" / f"{name}.json" for name in observations.GOLDEN]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def golden():
    return {name: value for file in FILES for name, value in json.loads(file.read_text()).items()}


@pytest.mark.parametrize("name", sorted(WITH_GOLDEN))
def test_builtin_does_what_detectron2_did(golden, name):
    # What is worth a golden value but belongs to torch or NumPy may move in its last digits between versions.
    assert not differences(as_json(WITH_GOLDEN[name](BUILTIN)), golden[name], 2e-4)


@pytest.mark.d2
@pytest.mark.parametrize("name", sorted(LIVE))
def test_builtin_does_what_detectron2_does(name):
    wanted = as_json(LIVE[name](detectron2_provider()))
    assert not differences(as_json(LIVE[name](BUILTIN)), wanted, 1e-6)


def test_golden_files_are_small():
    assert sum(path.stat().st_size for path in FILES) < 200_000


@pytest.mark.d2
def test_the_builtin_knows_every_key_of_detectron2():
    wanted = as_json(observations.unused_config_keys(detectron2_provider()))
    absent = unused_keys().keys() - wanted.keys()
    assert absent <= observations.LATER_KEYS.keys()
    assert {key: value for key, value in unused_keys().items() if key not in absent} == wanted


def test_every_exported_name_is_observed():
    assert set(observations.BY_NAME) == set(PLACES) == set(dfm_d2.framework.__all__) - OURS
    assert len(dfm_d2.framework.__all__) == len(set(dfm_d2.framework.__all__))
