"""The contract: every exported name does the same with both providers, side by side in one process, and what
Detectron2 did when the golden values were taken, on machines that have none. A whole detector is the same,
too, and Detectron2's own script analyses it."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import observations
import pytest
import torch
import yaml
from observations import LIVE, WITH_GOLDEN, as_json, differences
from observe_backbones import fill_by_formula, names_and_shapes
from providers import BUILTIN, detectron2_provider, run_python

import dfm_d2.registry  # noqa: F401  (registers the meta-architectures)
from dfm_d2.detection.data.shapes import write_shapes
from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.setup import load_config
from dfm_d2.framework import PROVIDER, Boxes, Instances, build_model
from dfm_d2.framework import __all__ as exported
from dfm_d2.framework._config_files import unused_keys
from dfm_d2.framework._providers import PLACES

ROOT = Path(__file__).resolve().parents[2]
TINY = "MODEL.DEVICE cpu MODEL.DFM.NUM_CLASSES 3 MODEL.DFM.NUM_PROPOSALS 8 SOLVER.BASE_LR 0.5"
_VIT = "['img_size=64','embed_dim=32','depth=4','num_heads=2']"
BACKBONES = {"resnet": "", "cnn of timm": "fpn_backbone MODEL.TIMM.NAME tf_efficientnet_lite0"}
BACKBONES["vit of timm"] = f"vit_pyramid_backbone MODEL.TIMM.OPTIONS {_VIT}"
BACKBONES = {k: f"MODEL.BACKBONE.NAME build_timm_{v}".split() if v else [] for k, v in BACKBONES.items()}
# For Detectron2's own script: fewer predictors, narrow.
CONFIG = f"""
_BASE_: {ROOT}/configs/shapes_flow_r18.yaml
MODEL:
  FPN: {{OUT_CHANNELS: 16}}
  DFM: {{NUM_PREDICTORS: 2, NUM_PROPOSALS: 10, HEAD: {{HIDDEN_DIM: 16, NUM_HEADS: 2, FEEDFORWARD_DIM: 16}}}}
DATASETS: {{VOC_ROOT: shapes}}
"""
OURS = {"PROVIDER", "merge_config_file", "merge_config_opts"}
FILES = [Path(__file__).parent / "golden" / f"{name}.json" for name in observations.GOLDEN]
GOLDEN = {name: value for file in FILES for name, value in json.loads(file.read_text()).items()}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(WITH_GOLDEN))
def test_builtin_does_what_detectron2_did(name):
    # What is worth a golden value but belongs to torch or NumPy may move in its last digits between versions.
    assert not differences(as_json(WITH_GOLDEN[name](BUILTIN)), GOLDEN[name], 2e-4)


@pytest.mark.d2
@pytest.mark.parametrize("name", sorted(LIVE))
def test_builtin_does_what_detectron2_does(name):
    wanted = as_json(LIVE[name](detectron2_provider()))
    assert not differences(as_json(LIVE[name](BUILTIN)), wanted, 1e-6)


@pytest.mark.d2
def test_the_builtin_knows_every_key_of_detectron2():
    wanted = as_json(observations.unused_config_keys(detectron2_provider()))
    absent = unused_keys().keys() - wanted.keys()
    assert absent <= observations.LATER_KEYS.keys()
    assert {key: value for key, value in unused_keys().items() if key not in absent} == wanted


def test_every_exported_name_is_observed_and_the_golden_files_are_small():
    assert set(observations.BY_NAME) == set(PLACES) == set(exported) - OURS
    assert len(exported) == len(set(exported))
    assert sum(path.stat().st_size for path in FILES) < 200_000


def _describe(cfg) -> dict:
    """What the provider of this process makes of a config."""
    torch.set_num_threads(1)
    model = build_model(cfg)
    fill_by_formula(model)
    image = (torch.arange(3 * 64 * 96) * 7 % 256).reshape(3, 64, 96).to(torch.uint8)
    truth = Instances((64, 96), gt_boxes=Boxes([[8.0, 8.0, 40.0, 50.0]]), gt_classes=torch.tensor([1]))
    batch = [{"image": image, "height": 128, "width": 192, "image_id": "a", "instances": truth}]
    losses = model.train()(batch)
    with torch.no_grad():
        found = model.eval()(batch)[0]["instances"]
    about = {"provider": [PROVIDER, Boxes.__module__], "config": yaml.safe_load(cfg.dump())}
    about |= {"state": names_and_shapes(model), "losses": losses, "boxes": found.pred_boxes}
    return as_json({**about, "scores": found.scores, "classes": found.pred_classes})


@pytest.mark.d2
@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_detector_is_the_same(tmp_path, backbone):
    """The builtin provider reads what the config is under Detectron2, with all of Detectron2's keys."""
    detectron2_provider()
    cfg = load_config(DETECTION, str(ROOT / "configs" / "shapes_flow_r18.yaml"), [*TINY.split(), *backbone])
    theirs = _describe(cfg)
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    done = run_python(__file__, str(path), DFM_FRAMEWORK="builtin")
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout.splitlines()[-1])
    assert theirs.pop("provider") == ["detectron2", "detectron2.structures.boxes"]
    assert ours.pop("provider") == ["builtin", "dfm_d2.framework._builtin.structures"]
    assert "ignores" not in done.stderr, "nothing differs from Detectron2's defaults"
    read, wanted = ours.pop("config"), theirs.pop("config")
    assert "ASPECT_RATIO_GROUPING" in wanted["DATALOADER"]
    assert read["SOLVER"]["BASE_LR"] == 0.5 and read["MODEL"]["DFM"] == wanted["MODEL"]["DFM"]
    assert _parts(read, wanted) == read
    assert ours["scores"], "the comparison needs detections"
    assert not differences(ours, theirs, tolerance=1e-5)


def _parts(names: dict, values: dict) -> dict:
    """What `values` has under the keys of `names`."""
    return {k: _parts(v, values[k]) if isinstance(v, dict) else values[k] for k, v in names.items()}


@pytest.mark.d2
def test_analyze_model(tmp_path):
    """Detectron2's own script on a config of ours, as the documentation says to run it."""
    detectron2_provider()
    script = Path(importlib.util.find_spec("detectron2").origin).parents[1] / "tools" / "analyze_model.py"
    if not script.is_file():
        pytest.skip("needs a checkout of Detectron2: an installed package lacks tools/")
    write_shapes(tmp_path / "shapes", 4, 3, 96, 0)
    (tmp_path / "config.yaml").write_text(CONFIG)
    docs = (ROOT / "docs" / "deploy.md").read_text()
    code, words = re.search(r'python -c "\n(import runpy\n.*?)\n" (--.*?)\n', docs, re.DOTALL).groups()
    code = code.replace("detectron2/tools/analyze_model.py", str(script))
    code, words = (text.replace("configs/shapes_flow_r18.yaml", "config.yaml") for text in (code, words))
    done = run_python("-c", code, *words.split(), "MODEL.DFM.SAMPLER.STEPS", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout + done.stderr
    assert "predictors.1.class_logits.weight" in said and "(6, 16)" in said, "the classes of the data set"
    assert float(re.search(r"Total GFlops: ([\d.]+)", said)[1]) > 0
    assert float(re.search(r"Total \(Million\) Activations: ([\d.]+)", said)[1]) > 0


if __name__ == "__main__":
    print(json.dumps(_describe(load_config(DETECTION, sys.argv[1], []))))
