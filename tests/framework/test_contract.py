"""The contract: every exported name does the same with both providers, side by side in one process."""

import observations
import pytest
import torch
from require_detectron2 import detectron2_provider

import dfm_d2.framework
from dfm_d2.framework import _builtin

OURS = {"PROVIDER", "merge_config_file", "merge_config_opts", "run_detectron2_script"}
ALL = {**observations.BY_NAME, **observations.BACKBONES, **observations.LIVE_ONLY}


@pytest.mark.d2
@pytest.mark.parametrize("name", sorted(ALL))
def test_builtin_does_what_detectron2_does(name):
    detectron2 = detectron2_provider()
    torch.set_num_threads(1)
    seen = observations.as_json(ALL[name](_builtin))
    wanted = observations.as_json(ALL[name](detectron2))
    assert not observations.differences(seen, wanted, tolerance=1e-6)


def test_every_exported_name_is_observed():
    assert set(observations.BY_NAME) == set(dfm_d2.framework.__all__) - OURS


def test_builtin_supplies_every_name():
    assert not [name for name in observations.BY_NAME if not hasattr(_builtin, name)]


@pytest.mark.d2
def test_detectron2_supplies_every_name():
    detectron2 = detectron2_provider()
    assert not [name for name in observations.BY_NAME if not hasattr(detectron2, name)]
