"""tools/train_net.py: training, evaluation, and one line for what the user can put right."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfm_d2.detection.data.shapes import write_shapes

ROOT = Path(__file__).parents[2]
CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")
CONFIG = str(ROOT / "configs/shapes_flow_r18.yaml")
TINY = (
    "SEED 1 SOLVER.IMS_PER_BATCH 2 SOLVER.LOG_PERIOD 1 SOLVER.MAX_ITER 1 TEST.EVAL_PERIOD 0 "
    "MODEL.DFM.NUM_PREDICTORS 2 MODEL.DFM.NUM_PROPOSALS 8 MODEL.DFM.SAMPLER.STEPS 2 "
    "MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.WIDTH_PER_GROUP 8 "
    "MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.FPN.OUT_CHANNELS 16 MODEL.DFM.HEAD.HIDDEN_DIM 16 "
    "MODEL.DFM.HEAD.FEEDFORWARD_DIM 32"
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


@pytest.fixture
def run(tool, options):
    def command(*opts: str, flags: tuple[str, ...] = ()) -> int:
        return tool.run_command(["--config-file", CONFIG, *flags, *options, *opts])

    return command


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_train_resume_and_evaluate(run, tmp_path, capsys):
    out = tmp_path / "out"
    weights = ("MODEL.WEIGHTS", str(out / "model_final.pth"))
    assert run("SOLVER.MAX_ITER", "2") == 0
    trained = lines(out)[-1]
    assert {"bbox/AP", "bbox/AP50"} <= trained.keys()
    assert {"model_final.pth", "config.yaml", "last_checkpoint", "log.txt"} <= set(os.listdir(out))
    assert list(out.glob("events.out.tfevents.*"))
    assert (out / "inference/coco_instances_results.json").is_file()
    assert "class" in capsys.readouterr().out

    assert run(*weights, flags=("--eval-only",)) == 0
    assert lines(out)[-1]["bbox/AP50"] == trained["bbox/AP50"]
    assert run(*weights, "DATASETS.CLASSES", f"{tuple(reversed(CLASSES))}", flags=("--eval-only",)) == 2
    assert "was trained for the classes circle" in capsys.readouterr().err

    config = (out / "config.yaml").read_text()
    assert run("MODEL.DFM.SIGNAL_SCALE", "1", flags=("--resume",)) == 2
    assert "was trained with MODEL.DFM.SIGNAL_SCALE 2.0" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == config, "a refused run replaced the config"

    assert run("SOLVER.MAX_ITER", "3", flags=("--resume",)) == 0
    steps = [line["iteration"] for line in lines(out) if "total_loss" in line]
    assert steps == [0, 1, 2] and "bbox/AP50" in lines(out)[-1]


# Arguments, and a part of what is said about them.
CASES = {
    "SOLVER.BASE_LRR 1": "SOLVER.BASE_LRR",
    "SOLVER.BASE_LR": "SOLVER.BASE_LR",
    "SOLVER.MAX_ITER many": "SOLVER.MAX_ITER",
    "SOLVER.IMS_PER_BATCH 0": "SOLVER.IMS_PER_BATCH is 0; it must be at least 1.",
    "DATASETS.VOC_ROOT /nowhere": "/nowhere",
    "DATASETS.TRAIN ('imagenet',)": "Unknown data set 'imagenet'",
    "DATASETS.TRAIN ()": "no image to train on",
    "MODEL.WEIGHTS /nowhere/r18.pth": "no weight file /nowhere/r18.pth",
    "MODEL.DFM.NUM_CLASSES 3": "MODEL.DFM.NUM_CLASSES is 3",
    "MODEL.RESNETS.NORM FrozenBN": "would stay frozen: set MODEL.RESNETS.NORM",
    "MODEL.RESNETS.NORM BatchNorm": "BatchNorm' is not",
    "MODEL.BACKBONE.FREEZE_AT 2": "would stay frozen: set MODEL.BACKBONE.FREEZE_AT 0",
    "MODEL.BACKBONE.NAME build_resnet": "see MODEL.BACKBONE.NAME",
    "MODEL.DFM.HEAD.IN_FEATURES ['p2','p4']": "strides [4, 16]",
    "MODEL.DFM.HEAD.IN_FEATURES ['p9']": "names ['p9']",
    "MODEL.DFM.UPDATE parallel MODEL.DFM.PREDICTOR_RANKS 2": "divide the number of processes, 1 (--num-gpus)",
    "--num-gpus 0": "--num-gpus 0 --num-machines 1 --machine-rank 0: give at least one",
    "--num-machines 2": "--num-machines needs --dist-url",
    "--eval-only": "--eval-only needs weights",
}


@pytest.mark.parametrize("given", CASES)
def test_what_the_user_can_put_right_is_one_line(run, capsys, given):
    flags, opts = ((), given.split()) if given[0] != "-" else (given.split(), ())
    assert run(*opts, flags=flags) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1 and CASES[given] in errors and "Traceback" not in errors


def test_a_traceback_is_for_bugs_and_on_demand(run, capsys, monkeypatch):
    def prepare(*_):
        raise ValueError("boom")

    monkeypatch.setattr("dfm_d2.detection.detector.FlowDetector.prepare", prepare)
    with pytest.raises(ValueError, match="boom"):  # a command ends with a traceback and status 1
        run()
    monkeypatch.setenv("DFM_DEBUG", "1")
    assert run("SOLVER.NOTHING", "1") == 2
    errors = capsys.readouterr().err
    assert "Traceback" in errors and "SOLVER.NOTHING" in errors.splitlines()[-1]


def test_a_missing_gpu_is_an_error_only_if_asked_for(run, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("MODEL.DEVICE", "cuda") == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert run() == 0


@pytest.mark.parametrize("provider", ["builtin", pytest.param("detectron2", marks=pytest.mark.d2)])
def test_mistakes_are_named_before_torch_is_imported_and_nothing_malicious_runs(provider, options, tmp_path):
    """From another folder; malicious weights come last, as torch reads them."""
    if provider == "detectron2":
        pytest.importorskip("detectron2")
    import torch

    marker = tmp_path / "marker"
    (tmp_path / "evil.yaml").write_text(f"SEED: !!python/object/apply:builtins.open ['{marker}', 'w']\n")
    torch.save({"model": {"weight": Marker(str(marker))}}, tmp_path / "evil.pth")
    digits = ["--config-file", str(ROOT / "configs/digits_flow_cnn.yaml")]
    train = ["train_net", "--config-file", CONFIG, *options]
    commands = [
        ["train_net", "--help"],
        ["train_classifier", "--help"],
        ["train_classifier", *digits, "UPDATE.METHOD", "none"],
        ["train_classifier", *digits, "DATASETS.TRAIN", "('root_train',)", "DATASETS.ROOT", "/nowhere"],
        [*train, "SOLVER.BASE_LRR", "1"],
        [*train, "DATASETS.VOC_ROOT", "/nowhere"],
        [*train, "MODEL.WEIGHTS", "/nowhere.pth"],
        ["train_net", "--config-file", "no_such.yaml"],
        ["train_net", "--config-file", "evil.yaml"],
        [*train, "MODEL.WEIGHTS", str(tmp_path / "evil.pth")],
    ]
    script = str(Path(__file__).with_name("tool_commands.py"))
    done = subprocess.run(
        [sys.executable, script, str(ROOT / "tools"), json.dumps(commands)],
        cwd=tmp_path,
        env=os.environ | {"DFM_FRAMEWORK": provider},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    statuses, had_torch = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [0, 0] + [2] * 8
    assert done.stderr.count("error: ") == 8 and "Traceback" not in done.stderr
    assert "evil.yaml" in done.stderr and "evil.pth" in done.stderr and not marker.exists()
    assert not had_torch or provider == "detectron2"


class Marker:
    """Opens a file for writing if it is unpickled by anything that runs code."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))
