"""tools/export_model.py: the AP of a file is that of its model; what is wrong is said in a sentence."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_model import spread, tiny_cfg

from dfm_d2.detection.data.shapes import SHAPE_CLASSES, write_shapes
from dfm_d2.engine.run import build_checkpointer
from dfm_d2.framework import build_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "export_model.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("export_model", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with shapes/, config.yaml and model_final.pth."""
    folder = tmp_path_factory.mktemp("run")
    write_shapes(folder / "shapes", 2, 4, 128, 0)
    cfg = tiny_cfg(NUM_CLASSES=len(SHAPE_CLASSES), NUM_PROPOSALS=20, SAMPLER__STEPS=1)
    cfg.INPUT.MIN_SIZE_TEST, cfg.OUTPUT_DIR = 0, str(folder)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.VOC_ROOT = str(folder / "shapes")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("voc_root_train",), ("voc_root_val",)
    cfg.DATASETS.CLASSES = list(SHAPE_CLASSES)
    torch.manual_seed(0)
    build_checkpointer(cfg, spread(build_model(cfg)), SHAPE_CLASSES).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.mark.parametrize("noise", ["input", "constant"])
def test_run_eval_gives_the_same_ap(tool, run, tmp_path, capsys, noise):
    words = ["--config-file", str(run / "config.yaml"), "--output", str(tmp_path), "--noise", noise]
    words += ["--run-eval", "--format", "torchscript", "MODEL.WEIGHTS", str(run / "model_final.pth")]
    assert tool.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    eager = next(line for line in lines if line.startswith("eager "))
    assert next(line for line in lines if line.startswith("torchscript ")).split()[1:] == eager.split()[1:]
    # The AP of an untrained detector says little: so do its detections.
    found = {}
    for name in ("eager", "torchscript"):
        path = tmp_path / name / "inference" / "coco_instances_results.json"
        found[name] = json.loads(path.read_text())
    assert len(found["eager"]) == len(found["torchscript"]) > 20
    for mine, theirs in zip(found["torchscript"], found["eager"]):
        assert (mine["image_id"], mine["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert mine["bbox"] == pytest.approx(theirs["bbox"], abs=0.1)
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["MODEL.WEIGHTS", "missing.pth"], "no weight file missing.pth"),
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        (["MODEL.DFM.SAMPLER.RENEWAL_THRESH", "0.5"], "RENEWAL_THRESH"),
        (["MODEL.DFM.NUM_PREDICTORS", "2"], "use the config that it was trained with"),
        (["MODEL.DFM.NUM_CLASSES", "3"], "was trained for 6 classes"),
    ],
)
def test_what_is_wrong_is_one_sentence(tool, run, tmp_path, capsys, options, said):
    words = ["--config-file", str(run / "config.yaml"), "--output", str(tmp_path)]
    assert tool.main([*words, "MODEL.WEIGHTS", str(run / "model_final.pth"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_an_unreadable_sample_and_zero_steps(tool, run, tmp_path, capsys):
    words = ["--config-file", str(run / "config.yaml"), "--output", str(tmp_path)]
    weights = ["MODEL.WEIGHTS", str(run / "model_final.pth")]
    assert tool.main([*words, "--sample-image", "missing.jpg", *weights]) == 2
    assert tool.main([*words, "--steps", "0", *weights]) == 2
    said = capsys.readouterr().err
    assert "missing.jpg cannot be decoded" in said and "steps must be at least 1" in said


def test_overrides_may_follow_the_predictors(tool, run, tmp_path, capsys):
    words = ["--config-file", str(run / "config.yaml"), "--output", str(tmp_path), "--predictors", "0", "1"]
    assert tool.main([*words, "MODEL.WEIGHTS", str(run / "model_final.pth")]) == 2
    assert "PREDICTORS must be empty with TIME 'partitioned'" in capsys.readouterr().err
