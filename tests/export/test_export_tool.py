"""tools/export_model.py: the AP of a file is that of its model; what is wrong is one error message."""

import json

import pytest
import torch
from tiny_model import spread, tiny_cfg
from tool_loader import load_tool

from dfm_d2.detection.data.shapes import SHAPE_CLASSES, write_shapes
from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.framework import build_model


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
    model, options = spread(build_model(cfg)), {"cfg": cfg, "class_names": SHAPE_CLASSES}
    SafeCheckpointer(model, str(folder), **options).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture
def export(run, tmp_path):
    """The tool's exit status with some options, and KEY VALUE overrides after that of the weights."""
    start = ["--config-file", str(run / "config.yaml"), "--output", str(tmp_path)]
    weights = ["MODEL.WEIGHTS", str(run / "model_final.pth")]
    main = load_tool("export_model").main
    return lambda options, *overrides: main([*start, *options, *weights, *overrides])


@pytest.mark.parametrize("noise", ["input", "constant"])
def test_run_eval_gives_the_same_ap(export, tmp_path, capsys, noise):
    assert export(["--noise", noise, "--run-eval", "--format", "torchscript"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert lines["torchscript"] == lines["eager"] and len(lines["eager"]) == 4
    # The AP of an untrained detector says little: so do its detections.
    files = [tmp_path / name / "inference/coco_instances_results.json" for name in ("eager", "torchscript")]
    found = [json.loads(file.read_text()) for file in files]
    assert len(found[0]) > 20
    for theirs, mine in zip(*found, strict=True):
        assert (mine["image_id"], mine["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert mine["bbox"] == pytest.approx(theirs["bbox"], abs=0.1)
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["MODEL.WEIGHTS", "missing.pth"], "no weight file missing.pth"),
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        (["MODEL.DFM.SAMPLER.STEPS", "-1"], "MODEL.DFM.SAMPLER.STEPS is -1"),
        (["MODEL.DFM.SAMPLER.MEMBERS", "[1]"], "SAMPLER.MEMBERS is [1]; an interval"),
        (["MODEL.DFM.NUM_PREDICTORS", "2"], "use the config that it was trained with"),
        (["MODEL.DFM.NUM_CLASSES", "3"], "was trained for 6 classes"),
        ([], "missing.jpg cannot be decoded"),
    ],
)
def test_what_is_wrong_is_one_error_message(export, capsys, overrides, said):
    assert export([] if overrides else ["--sample-image", "missing.jpg"], *overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
