"""tools/train_net.py: training, evaluation, and one line for what the user can put right."""

import ctypes
import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import timm
import tiny_training
import torch
from test_checkpoints import Made
from tiny_model import tiny_cfg
from tiny_training import words
from tool_loader import ROOT, load_tool

from dfm_d2.detection import FlowPredictor
from dfm_d2.engine.metrics import read_metrics
from dfm_d2.engine.setup import resolve_device


@pytest.fixture
def run(shapes, tmp_path):
    """The exit status of the tool: arguments KEY=VALUE are overrides, the others flags."""
    command = load_tool("train_net").run_command
    return lambda *arguments: command(words(shapes, tmp_path / "out", "SOLVER.MAX_ITER=1", *arguments))


def test_train_resume_and_evaluate(run, tmp_path, capsys):
    out = tmp_path / "out"
    weights = f"MODEL.WEIGHTS={out}/model_final.pth"
    assert run("SOLVER.MAX_ITER=2") == 0
    trained = read_metrics(out / "metrics.json")[-1]
    assert {"bbox/AP", "bbox/AP50"} <= trained.keys()
    assert {"model_final.pth", "config.yaml", "last_checkpoint", "log.txt"} <= set(os.listdir(out))
    assert list(out.glob("events.out.tfevents.*"))
    assert (out / "inference/coco_instances_results.json").is_file()
    assert "class" in capsys.readouterr().out

    assert run("--eval-only", weights) == 0
    assert read_metrics(out / "metrics.json")[-1]["bbox/AP50"] == trained["bbox/AP50"]
    backwards = ("triangle", "star", "square", "ring", "cross", "circle")
    assert run("--eval-only", weights, f"DATASETS.CLASSES={backwards}") == 2
    assert "was trained for the classes circle" in capsys.readouterr().err

    config = (out / "config.yaml").read_text()
    assert run("--resume", "MODEL.DFM.SIGNAL_SCALE=1") == 2
    assert "was trained with MODEL.DFM.SIGNAL_SCALE 2.0" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == config, "a refused run replaced the config"

    assert run("--resume", "SOLVER.MAX_ITER=3") == 0
    lines = read_metrics(out / "metrics.json")
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1, 2]
    assert "bbox/AP50" in lines[-1]


def test_one_command_from_a_folder_of_photographs_to_pictures(run, tmp_path):
    assert run("DATASETS.TRAIN=('root_train',)", "DATASETS.TEST=('root_test',)") == 0
    pictures = {"dataset.png", "predictions.png", "flow.png"}
    assert pictures <= set(os.listdir(tmp_path / "out")) and list((tmp_path / "out").glob("*.html"))


def test_a_checkpoint_needs_the_pretrained_file_of_timm_no_more(run, tmp_path, capsys):
    weights, out = tmp_path / "timm.pth", tmp_path / "out"
    torch.save(timm.create_model("test_efficientnet").state_dict(), weights)
    options = ["MODEL.BACKBONE.NAME=build_timm_fpn_backbone", "MODEL.TIMM.NAME=test_efficientnet"]
    options.append(f"MODEL.TIMM.WEIGHTS={weights}")
    assert run(*options) == 0
    weights.unlink()
    assert run(*options, "--eval-only", f"MODEL.WEIGHTS={out}/model_final.pth") == 0
    assert run(*options, "--resume", "SOLVER.MAX_ITER=2") == 0
    assert run(*options) == 2
    assert "timm.pth is missing" in capsys.readouterr().err


def test_scores_are_calibrated_on_images_that_are_not_trained_on(run, tmp_path):
    out = tmp_path / "out"
    assert run("SOLVER.BASE_LR=0.01", "DATASETS.HOLD_OUT=0.25") == 0
    log = (out / "log.txt").read_text()
    assert "data set voc_root_train: 9 images" in log and "found on 3 held-out images" in log
    predictor = FlowPredictor.from_files(
        str(out / "config.yaml"), str(out / "model_final.pth"), threshold="auto"
    )
    assert predictor.model.temperature != 1 and 0 < predictor.model.threshold < 1
    assert predictor.model.sampler.settings.score_thresh == predictor.model.threshold
    assert read_metrics(out / "metrics.json")[-1]["bbox/D-ECE"] >= 0


# Arguments, and a part of what is said about them.
CASES = {
    "SOLVER.BASE_LRR=1": "SOLVER.BASE_LRR",
    "SOLVER.BASE_LR": "Config overrides come in pairs KEY VALUE",
    "SOLVER.MAX_ITER=many": "SOLVER.MAX_ITER",
    "SOLVER.IMS_PER_BATCH=0": "SOLVER.IMS_PER_BATCH is 0; it must be at least 1.",
    "DATASETS.VOC_ROOT=/nowhere": "/nowhere",
    "DATASETS.TRAIN=('imagenet',)": "Unknown data set 'imagenet'",
    "DATASETS.TRAIN=()": "no image to train on",
    "MODEL.WEIGHTS=/nowhere/r18.pth": "no weight file /nowhere/r18.pth",
    "MODEL.DFM.NUM_CLASSES=3": "MODEL.DFM.NUM_CLASSES is 3",
    "MODEL.RESNETS.NORM=FrozenBN": "would stay frozen: set MODEL.RESNETS.NORM",
    "MODEL.RESNETS.NORM=BatchNorm": "BatchNorm' is not",
    "MODEL.BACKBONE.FREEZE_AT=2": "would stay frozen: set MODEL.BACKBONE.FREEZE_AT 0",
    "MODEL.BACKBONE.NAME=build_resnet": "MODEL.BACKBONE.NAME is 'build_resnet'; choose one of",
    "MODEL.DFM.HEAD.IN_FEATURES=['p2','p4']": "strides [4, 16]",
    "MODEL.DFM.HEAD.IN_FEATURES=['p9']": "names ['p9']",
    "MODEL.DFM.UPDATE=parallel MODEL.DFM.PREDICTOR_RANKS=2": "divide the number of processes, 1 (--num-gpus)",
    "--num-gpus 0": "--num-gpus 0 --num-machines 1 --machine-rank 0: give at least one",
    "--num-machines 2": "--num-machines needs --dist-url",
    "--eval-only": "--eval-only needs weights",
}


@pytest.mark.parametrize("given", CASES)
def test_what_the_user_can_put_right_is_one_line(run, capsys, given):
    assert run(*given.split()) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1 and CASES[given] in errors and "Traceback" not in errors


def test_a_traceback_is_for_bugs_and_on_demand(run, capsys, monkeypatch):
    broken = mock.Mock(side_effect=ValueError("boom"))
    monkeypatch.setattr("dfm_d2.detection.detector.FlowDetector.prepare", broken)
    with pytest.raises(ValueError, match="boom"):  # a command ends with a traceback and status 1
        run()
    monkeypatch.setenv("DFM_DEBUG", "1")
    assert run("SOLVER.NOTHING=1") == 2
    errors = capsys.readouterr().err
    assert "Traceback" in errors and "SOLVER.NOTHING" in errors.splitlines()[-1]


def test_a_missing_gpu_is_an_error_only_if_asked_for(run, capsys, monkeypatch):
    for number, device in enumerate(("cuda", "cuda:1")):
        monkeypatch.setattr("torch.cuda.device_count", lambda number=number: number)
        assert run(f"MODEL.DEVICE={device}") == 2
        assert f"MODEL.DEVICE {device} was asked for, but torch sees no such" in capsys.readouterr().err
        cfg = tiny_cfg()
        cfg.MODEL.DEVICE = device
        resolve_device(cfg, explicit=False)
        assert cfg.MODEL.DEVICE == "cpu"


# Runs [[tool, argument, ...], ...]. Prints [[status, ...], whether torch was there before the last one].
RUN_COMMANDS = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
statuses = []
for tool, *words in json.loads(sys.argv[2]):
    has_torch = "torch" in sys.modules
    try:
        statuses.append(importlib.import_module(tool).run_command(words))
    except SystemExit as end:  # of the argument parser
        statuses.append(end.code)
print(json.dumps([statuses, has_torch]))
"""


def test_mistakes_are_named_before_torch_is_imported_and_nothing_malicious_runs(provider, shapes, tmp_path):
    """From another folder; malicious weights come last, as torch reads them."""
    marker = tmp_path / "marker"
    (tmp_path / "evil.yaml").write_text(f"SEED: !!python/object/apply:builtins.open ['{marker}', 'w']\n")
    torch.save({"model": {"weight": Made(open, (str(marker), "w"))}}, tmp_path / "evil.pth")
    digits = ["--config-file", str(ROOT / "configs/digits_flow_cnn.yaml")]
    train = ["train_net", *words(shapes, tmp_path / "out")]
    commands = [[tool, "--help"] for tool in ("train_net", "train_classifier")]
    for bad in ("UPDATE.METHOD none", "DATASETS.TRAIN ('root_train',) DATASETS.ROOT /nowhere"):
        commands.append(["train_classifier", *digits, *bad.split()])
    for bad in ("SOLVER.BASE_LRR 1", "DATASETS.VOC_ROOT /nowhere", "MODEL.WEIGHTS /nowhere.pth"):
        commands.append([*train, *bad.split()])
    commands += [["train_net", "--config-file", file] for file in ("no_such.yaml", "evil.yaml")]
    commands.append([*train, "MODEL.WEIGHTS", str(tmp_path / "evil.pth")])
    arguments = [sys.executable, "-c", RUN_COMMANDS, str(ROOT / "tools"), json.dumps(commands)]
    done = tiny_training.run(arguments, folder=tmp_path, DFM_FRAMEWORK=provider)
    statuses, had_torch = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [0, 0] + [2] * 8
    assert done.stderr.count("error: ") == 8 and "Traceback" not in done.stderr
    assert "evil.yaml" in done.stderr and "evil.pth" in done.stderr and not marker.exists()
    assert not had_torch or provider == "detectron2"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="of glibc")
def test_what_is_freed_stays_in_the_process():
    code = """import torch; from dfm_d2.engine.setup import keep_freed_memory
def resident(): return int(open("/proc/self/statm").read().split()[1])
keep_freed_memory(); x = torch.zeros(2**26); full = resident(); del x; print(resident() / full)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.95
