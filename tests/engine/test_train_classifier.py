"""tools/train_classifier.py: training, evaluation, pictures, resume, and one sentence for what is wrong."""

import itertools
import json
import math
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import assert_same_run
from tiny_classifier import VIT, save_timm_vit

from dfm_d2.classification.evaluation import class_summary, classification_metrics
from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.engine.metrics import read_metrics
from dfm_d2.framework import PROVIDER

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/digits_flow_cnn.yaml")
run_command = runpy.run_path(str(ROOT / "tools/train_classifier.py"))["run_command"]
TINY = (
    "SEED 1 SOLVER.IMS_PER_BATCH 16 SOLVER.LOG_PERIOD 1 TEST.EVAL_PERIOD 0 SOLVER.WARMUP_ITERS 0 "
    "MODEL.CLASSIFIER.CNN.CHANNELS (8,8) MODEL.CLASSIFIER.CNN.STRIDES (2,1) MODEL.CLASSIFIER.HIDDEN_DIM 16"
).split()


@pytest.fixture
def run(tmp_path):
    start, tiny = ["--config-file", CONFIG], [*TINY, "OUTPUT_DIR", str(tmp_path / "out")]
    return lambda *opts, flags=(): run_command([*start, *flags, *tiny, *opts])


@pytest.mark.parametrize("method", ["flow", "backprop", "deep_supervision", "forward_forward"])
def test_train_evaluate_and_draw(run, tmp_path, method, capsys):
    out, options = tmp_path / "out", ["UPDATE.METHOD", method]
    assert run(*options, "SOLVER.MAX_ITER", "3") == 0
    last = read_metrics(out / "metrics.json")[-1]
    assert {"accuracy", "nll", "ece", "accuracy-7"} <= last.keys()
    expected = {"model_final.pth", "config.yaml", "curves.png", "log.txt", "inference"}
    assert (expected | ({"flow.png"} if method == "flow" else set())) <= set(os.listdir(out))
    assert list(out.glob("events.out.tfevents.*"))
    found = [json.loads(line) for line in (out / "inference/predictions.json").read_text().splitlines()]
    assert len(found) == 359
    right = np.mean([np.argmax(item["probs"]) == item["label"] for item in found])
    assert last["accuracy"] == pytest.approx(100 * right)
    weights = ["MODEL.WEIGHTS", str(out / "model_final.pth")]
    assert run(*options, *weights, flags=("--eval-only",)) == 0
    assert read_metrics(out / "metrics.json")[-1]["accuracy"] == last["accuracy"]
    assert run(*options, *weights, "MODEL.CLASSIFIER.SAMPLER.BLOCKS", "[-1]", flags=("--eval-only",)) == 0
    if method == "flow":
        capsys.readouterr()
        assert run("UPDATE.METHOD", "backprop", *weights, flags=("--eval-only",)) == 2
        assert "was trained with MODEL.META_ARCHITECTURE FlowClassifier" in capsys.readouterr().err


def train(folder: Path, kill: bool) -> None:
    """A training in a process of its own, killed right after its first checkpoint if it is to be."""
    tag = SafeCheckpointer.tag_last_checkpoint
    if kill:
        SafeCheckpointer.tag_last_checkpoint = lambda *a: (tag(*a), os.kill(os.getpid(), signal.SIGKILL))
    torch.set_num_threads(1)
    options = "SOLVER.MAX_ITER 9 SOLVER.CHECKPOINT_PERIOD 4 TEST.EVAL_PERIOD 3 OUTPUT_DIR".split()
    sys.exit(run_command(["--config-file", CONFIG, "--resume", *TINY, *options, str(folder)]))


def test_killed_and_resumed_equals_uninterrupted(provider, server, tmp_path):
    """Killed right after a checkpoint, within an epoch: the same metrics and weights, bit for bit."""
    if provider != PROVIDER:
        pytest.skip(f"the framework here is {PROVIDER}")
    for name, kill in (("straight", False), ("killed", True), ("killed", False)):
        child = server.Process(target=train, args=(tmp_path / name, kill))
        child.start()
        child.join()
        assert child.exitcode == (-signal.SIGKILL if kill else 0)
        assert kill != (tmp_path / name / "model_final.pth").exists()
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_what_the_user_can_put_right_is_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"other.weight": torch.ones(3)}, "other.pth")
    for key, value, says in (
        ("INPUT.RANDOM_SHIFT", "8", "INPUT.RANDOM_SHIFT is 8, but digits["),
        # Of another network altogether; the batch norms' counters, which torch does not miss, match nothing.
        ("MODEL.WEIGHTS", "other.pth", "other.pth matches this model"),
    ):
        assert run("SOLVER.MAX_ITER", "1", key, value) == 2
        errors = capsys.readouterr().err
        assert errors.count("error: ") == 1 and says in errors and "Traceback" not in errors


def test_broken_images_are_left_out_or_fatal(run, tmp_path, capsys):
    """Unverified, they are met in training, in the evaluation and for flow.png; sizes are made one."""
    rng, root = np.random.default_rng(0), tmp_path / "data"
    for split, label, index in itertools.product(("train", "test"), ("cat", "dog"), range(4)):
        (root / split / label).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, ({"cat": 10, "dog": 14}[label], 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / label / f"{index}.png")
    for broken in (root / "train/dog/3.png", root / "test/cat/0.png"):
        broken.write_bytes(broken.read_bytes()[:60])
    options = ["DATASETS.ROOT", str(root), "DATASETS.TRAIN", "('root_train',)", "INPUT.IMAGE_SIZE", "8"]
    options += ["DATASETS.TEST", "('root_test',)", "SOLVER.MAX_ITER", "2"]
    assert run(*options, "DATASETS.VERIFY_IMAGES", "never") == 0
    log = (tmp_path / "out/log.txt").read_text()
    assert "root_train: 8 images, 2 classes" in log
    assert all(f"{root}/{name}" in log for name in ("train/dog/3.png", "test/cat/0.png"))
    assert {"accuracy-cat", "accuracy-dog"} <= read_metrics(tmp_path / "out/metrics.json")[-1].keys()
    predictions = tmp_path / "out/inference/predictions.json"
    assert (tmp_path / "out/flow.png").exists() and len(predictions.read_text().splitlines()) == 7
    assert run(*options) == 0 and "root_train: 7 images" in (tmp_path / "out/log.txt").read_text()
    capsys.readouterr()
    assert run(*options, "DATASETS.ON_ERROR", "fatal") == 2
    assert f"{root}/train/dog/3.png" in capsys.readouterr().err


def test_a_checkpoint_needs_the_pretrained_file_no_more(run, tmp_path, capsys):
    weights = tmp_path / "timm.pth"
    save_timm_vit(weights)
    options = [*VIT, "MODEL.TIMM.WEIGHTS", str(weights)]
    assert run(*options, "SOLVER.MAX_ITER", "1") == 0
    weights.unlink()
    final = ["MODEL.WEIGHTS", str(tmp_path / "out/model_final.pth")]
    assert run(*options, *final, flags=("--eval-only",)) == 0
    assert run(*options, "SOLVER.MAX_ITER", "2", flags=("--resume",)) == 0
    assert str(weights) in (tmp_path / "out/config.yaml").read_text()
    assert run(*options, "SOLVER.MAX_ITER", "2") == 2
    assert "timm.pth is missing" in capsys.readouterr().err


def test_weights_to_start_from_leave_what_the_config_sets(run, tmp_path):
    """The temperature of another method is not taken over; layers are."""
    out, start = tmp_path / "out", tmp_path / "start.pth"
    frozen, found = ["SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "1e-30"], []
    for options in (["UPDATE.METHOD", "backprop"], ["MODEL.WEIGHTS", str(start)]):
        assert run(*frozen, *options) == 0
        (out / "model_final.pth").rename(start)
        found.append(torch.load(start, weights_only=True)["model"])
    assert [model["temperature"].item() for model in found] == [1, pytest.approx(0.1)]
    assert torch.equal(*(model["backbone.stages.0.0.first.0.weight"] for model in found))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flow", "backprop"])
def test_the_digits_are_learned(tmp_path, method):
    """The config as it is: at least 97 %."""
    arguments = ["--config-file", CONFIG, "OUTPUT_DIR", str(tmp_path), "UPDATE.METHOD", method]
    assert run_command(arguments) == 0
    assert read_metrics(tmp_path / "metrics.json")[-1]["accuracy"] >= 97.0


def test_metrics_by_hand():
    probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.05, 0.95]])
    found = classification_metrics(probs, np.array([0, 1, 1, 1]), ["a", "b"])
    assert found["accuracy"] == 75 and found["accuracy-a"] == 100
    assert found["accuracy-b"] == pytest.approx(200 / 3)
    assert found["nll"] == pytest.approx(-sum(map(math.log, (0.9, 0.4, 0.7, 0.95))) / 4)
    # Bins of 1/15: each confidence lies in one of its own, but 0.95 and 0.9 (13.5 and 14.25) do too.
    assert found["ece"] == pytest.approx(100 * (0.1 + 0.6 + 0.3 + 0.05) / 4)
    assert class_summary(found).startswith("accuracy 75.00%")
    # Sure and right is calibrated; a class without images has no accuracy.
    found = classification_metrics(np.eye(2)[[0, 0]], np.array([0, 0]), ["a", "b"])
    assert found["ece"] == 0 and found["nll"] == pytest.approx(0) and math.isnan(found["accuracy-b"])
