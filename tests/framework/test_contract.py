"""The contract: every exported name does the same with both providers, side by side in one process."""

import os
import subprocess
import sys

import observations
import pytest
import torch
import yaml
from require_detectron2 import detectron2_provider

import dfm_d2.framework
from dfm_d2.framework import _builtin
from dfm_d2.framework._builtin.config import unused_keys

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


@pytest.mark.d2
def test_the_builtin_knows_every_key_of_detectron2():
    wanted = observations.as_json(observations.unused_config_keys(detectron2_provider()))
    absent = unused_keys().keys() - wanted.keys()
    assert absent <= observations.LATER_KEYS.keys()
    assert {key: value for key, value in unused_keys().items() if key not in absent} == wanted


@pytest.mark.d2
def test_a_config_dumped_under_detectron2_is_read_by_the_builtin(tmp_path):
    detectron2_provider()
    path = tmp_path / "config.yaml"
    dump = (
        "from dfm_d2.engine.setup import load_config; o = 'SOLVER.BASE_LR 0.5 MODEL.DFM.NUM_PREDICTORS 3'; "
        "print(load_config(DETECTION, '{}', o.split()).dump())"
    )
    theirs = _python(dump.format(""), "detectron2").stdout
    path.write_text(theirs)
    read = _python(dump.format(path), "builtin")
    theirs, ours = yaml.safe_load(theirs), yaml.safe_load(read.stdout)
    assert "ASPECT_RATIO_GROUPING" in theirs["DATALOADER"]
    assert ours["SOLVER"]["BASE_LR"] == 0.5 and ours["MODEL"]["DFM"] == theirs["MODEL"]["DFM"]
    assert _parts(ours, theirs) == ours
    assert "ignores" not in read.stderr, "nothing differs from Detectron2's defaults"


def _python(code: str, framework: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "DFM_FRAMEWORK": framework, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def _parts(names: dict, values: dict) -> dict:
    """What `values` has under the keys of `names`."""
    return {k: _parts(v, values[k]) if isinstance(v, dict) else values[k] for k, v in names.items()}


def test_every_exported_name_is_observed():
    assert set(observations.BY_NAME) == set(dfm_d2.framework.__all__) - OURS


def test_builtin_supplies_every_name():
    assert not [name for name in observations.BY_NAME if not hasattr(_builtin, name)]


@pytest.mark.d2
def test_detectron2_supplies_every_name():
    detectron2 = detectron2_provider()
    assert not [name for name in observations.BY_NAME if not hasattr(detectron2, name)]
