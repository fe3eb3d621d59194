"""tools/train_net.py: training, evaluation, and one clear sentence for what the user can put right."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfm_d2.detection.data.shapes import write_shapes

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/shapes_flow_r18.yaml")
TINY = (
    "SEED 1 SOLVER.IMS_PER_BATCH 2 SOLVER.LOG_PERIOD 1 MODEL.DFM.NUM_PREDICTORS 2 MODEL.DFM.NUM_PROPOSALS 8 "
    "MODEL.DFM.HEAD.FEEDFORWARD_DIM 32 TEST.EVAL_PERIOD 0"
).split()


@pytest.fixture(scope="module")
def tool():
    """tools/train_net.py as a module."""
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools/train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, num_train=6, num_val=2, size=64, seed=0)
    return folder


@pytest.fixture
def options(shapes, tmp_path) -> list[str]:
    return [*TINY, "DATASETS.VOC_ROOT", str(shapes), "OUTPUT_DIR", str(tmp_path / "out")]


def last_line(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text().splitlines()[-1])


def test_train_resume_and_evaluate(tool, options, tmp_path, capsys):
    out = tmp_path / "out"
    train = ["--config-file", CONFIG]
    assert tool.run_command([*train, *options, "SOLVER.MAX_ITER", "2", "SOLVER.EMA_DECAY", "0.5"]) == 0
    trained = last_line(out)
    assert {"bbox/AP", "bbox/AP50", "bbox_ema/AP50"} <= trained.keys()
    assert {"model_final.pth", "config.yaml", "last_checkpoint", "log.txt"} <= set(os.listdir(out))
    assert list(out.glob("events.out.tfevents.*"))
    assert (out / "inference/coco_instances_results.json").is_file()
    assert "class" in capsys.readouterr().out

    weights = ["MODEL.WEIGHTS", str(out / "model_final.pth")]
    assert tool.run_command([*train, "--eval-only", *options, *weights]) == 0
    evaluated = last_line(out)
    assert evaluated["bbox/AP50"] == trained["bbox/AP50"]

    config = (out / "config.yaml").read_text()
    other = ["MODEL.DFM.SIGNAL_SCALE", "1"]
    assert tool.run_command([*train, "--resume", *options, *other]) == 2
    assert "was trained with MODEL.DFM.SIGNAL_SCALE 2.0" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == config, "a refused run replaced the config"

    assert tool.run_command([*train, "--resume", *options, "SOLVER.MAX_ITER", "3"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    steps = [line["iteration"] for line in lines if "total_loss" in line]
    assert steps == [0, 1, 2] and "bbox/AP50" in lines[-1]


CASES = {
    "unknown key": (["SOLVER.BASE_LRR", "1"], "SOLVER.BASE_LRR"),
    "missing value": (["SOLVER.BASE_LR"], "SOLVER.BASE_LR"),
    "wrong type": (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
    "bad choice": (["MODEL.DFM.UPDATE", "serial"], "choose one of joint, sequential"),
    "bad number": (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH is 0; it must be at least 1"),
    "missing data": (["DATASETS.VOC_ROOT", "/nowhere"], "/nowhere"),
    "unknown data": (["DATASETS.TRAIN", "('imagenet',)"], "imagenet"),
    "missing weights": (["MODEL.WEIGHTS", "/nowhere/r18.pth"], "no weight file /nowhere/r18.pth"),
    "class number": (["MODEL.DFM.NUM_CLASSES", "3"], "MODEL.DFM.NUM_CLASSES is 3"),
    "scratch frozen": (["MODEL.RESNETS.NORM", "FrozenBN"], "cannot train from scratch"),
    "scratch stem": (["MODEL.BACKBONE.FREEZE_AT", "2"], "MODEL.BACKBONE.FREEZE_AT 0"),
    "time grid": (["MODEL.DFM.SAMPLER.TIME_GRID", "[0.0, 0.5]"], "it must increase from 0 to 1"),
    "no process": (["--num-gpus", "0"], "--num-gpus 0 --num-machines 1 --machine-rank 0: give at least one"),
    "no meeting point": (["--num-machines", "2"], "--num-machines needs --dist-url"),
    "local cascade": (["MODEL.META_ARCHITECTURE", "CascadeDetector"], "set MODEL.DFM.UPDATE joint"),
    "levels apart": (["MODEL.DFM.HEAD.IN_FEATURES", "['p2', 'p4']"], "strides [4, 16]"),
    "no such level": (["MODEL.DFM.HEAD.IN_FEATURES", "['p9']"], "names ['p9']"),
    "no train set": (["DATASETS.TRAIN", "()"], "no image to train on"),
    "no such device": (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu': set it to cpu, cuda"),
    "no such backbone": (["MODEL.BACKBONE.NAME", "build_resnet"], "see MODEL.BACKBONE.NAME"),
    "no such norm": (["MODEL.RESNETS.NORM", "BatchNorm"], "BatchNorm' is not"),
    "no sizes": (["INPUT.MIN_SIZE_TRAIN", "()"], "INPUT.MIN_SIZE_TRAIN is empty"),
}


@pytest.mark.parametrize("name", CASES)
def test_user_errors_are_one_sentence(tool, options, capsys, name):
    given, expected = CASES[name]
    flags = given if given[0].startswith("--") else []
    overrides = [] if flags else given
    status = tool.run_command(["--config-file", CONFIG, *flags, *options, "SOLVER.MAX_ITER", "1", *overrides])
    errors = capsys.readouterr().err
    assert status == 2
    assert errors.count("error: ") == 1 and expected in errors and "Traceback" not in errors


def test_evaluation_wants_weights_and_the_same_classes(tool, options, shapes, tmp_path, capsys):
    base = ["--config-file", CONFIG, "--eval-only", *options]
    assert tool.run_command(base) == 2
    assert "--eval-only needs weights" in capsys.readouterr().err
    assert tool.run_command(["--config-file", CONFIG, *options, "SOLVER.MAX_ITER", "1"]) == 0
    weights = ["MODEL.WEIGHTS", str(tmp_path / "out/model_final.pth")]
    classes = "('triangle', 'star', 'square', 'ring', 'cross', 'circle')"
    capsys.readouterr()
    assert tool.run_command([*base, *weights, "DATASETS.CLASSES", classes]) == 2
    assert "was trained for the classes circle" in capsys.readouterr().err


def test_a_missing_gpu_is_an_error_only_if_asked_for(tool, options, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    base = ["--config-file", CONFIG, *options, "SOLVER.MAX_ITER", "1"]
    assert tool.run_command([*base, "MODEL.DEVICE", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert tool.run_command(base) == 0


@pytest.mark.parametrize("provider", ["builtin", pytest.param("detectron2", marks=pytest.mark.d2)])
def test_from_another_folder_and_nothing_malicious_runs(provider, options, tmp_path):
    """As a process: a malicious config and malicious weights end in a sentence, status 2, and no marker."""
    if provider == "detectron2":
        pytest.importorskip("detectron2")
    import torch

    marker = tmp_path / "marker"
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"OUTPUT_DIR: !!python/object/apply:builtins.open ['{marker}', 'w']\n")
    torch.save({"model": {"weight": Marker(str(marker))}}, tmp_path / "evil.pth")
    environment = os.environ | {"DFM_FRAMEWORK": provider}
    for arguments in (
        ["--config-file", str(evil)],
        ["--config-file", CONFIG, *options, "MODEL.WEIGHTS", str(tmp_path / "evil.pth")],
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools/train_net.py"), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
        assert not marker.exists()


class Marker:
    """Opens a file for writing if it is unpickled by anything that runs code."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))
