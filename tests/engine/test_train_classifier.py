"""tools/train_classifier.py: training, evaluation, pictures, resume, and one sentence for what is wrong."""

import json
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

from dfm_d2.engine.checkpoint import SafeCheckpointer
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
    def command(*opts: str, flags: tuple[str, ...] = ()) -> int:
        return run_command(
            ["--config-file", CONFIG, *flags, *TINY, "OUTPUT_DIR", str(tmp_path / "out"), *opts]
        )

    return command


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("method", ["flow", "backprop", "forward_forward"])
def test_train_evaluate_and_draw(run, tmp_path, method, capsys):
    out = tmp_path / "out"
    options = ["UPDATE.METHOD", method, "SOLVER.EMA_DECAY", "0.5"]
    assert run(*options, "SOLVER.MAX_ITER", "3") == 0
    last = lines(out)[-1]
    assert {"accuracy", "accuracy_ema", "nll", "ece", "accuracy-7"} <= last.keys()
    assert 0 <= last["accuracy"] <= 100
    expected = {"model_final.pth", "config.yaml", "curves.png", "log.txt", "inference", "inference_ema"}
    assert (expected | ({"flow.png"} if method == "flow" else set())) <= set(os.listdir(out))
    assert list(out.glob("events.out.tfevents.*"))
    predictions = (out / "inference/predictions.json").read_text().splitlines()
    assert len(predictions) == 359
    found = [json.loads(line) for line in predictions]
    right = np.mean([np.argmax(item["probs"]) == item["label"] for item in found])
    assert last["accuracy"] == pytest.approx(100 * right)

    weights = ["MODEL.WEIGHTS", str(out / "model_final.pth")]
    assert run(*options, *weights, flags=("--eval-only",)) == 0
    assert lines(out)[-1]["accuracy"] == last["accuracy"]
    assert run(*options, *weights, "MODEL.CLASSIFIER.SAMPLER.BLOCKS", "[-1]", flags=("--eval-only",)) == 0
    if method == "flow":
        capsys.readouterr()
        assert run(*options[2:], "UPDATE.METHOD", "backprop", *weights, flags=("--eval-only",)) == 2
        assert "was trained with MODEL.META_ARCHITECTURE FlowClassifier" in capsys.readouterr().err


def train(folder: Path, kill: bool) -> None:
    """A training in a process of its own, killed right after its first checkpoint if it is to be."""
    tag = SafeCheckpointer.tag_last_checkpoint

    def tag_and_die(self, file: str) -> None:
        tag(self, file)
        os.kill(os.getpid(), signal.SIGKILL)

    if kill:
        SafeCheckpointer.tag_last_checkpoint = tag_and_die
    torch.set_num_threads(1)
    options = ["SOLVER.MAX_ITER", "9", "SOLVER.CHECKPOINT_PERIOD", "4", "TEST.EVAL_PERIOD", "3"]
    options += ["SOLVER.EMA_DECAY", "0.5", "OUTPUT_DIR", str(folder)]
    sys.exit(run_command(["--config-file", CONFIG, "--resume", *TINY, *options]))


@pytest.mark.parametrize("provider", ["builtin", pytest.param("detectron2", marks=pytest.mark.d2)])
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


# Overrides, and a part of what is said about them.
CASES = {
    "DATASETS.TRAIN ('imagenet_train',)": "Unknown data set 'imagenet_train'",
    "INPUT.RANDOM_SHIFT 8": "INPUT.RANDOM_SHIFT is 8, but digits[",
    "MODEL.DFM.NUM_CLASSES 3": "MODEL.DFM.NUM_CLASSES is 3",
}


@pytest.mark.parametrize("given", CASES)
def test_what_the_user_can_put_right_is_one_line(run, capsys, given):
    assert run("SOLVER.MAX_ITER", "1", *given.split()) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1 and CASES[given] in errors and "Traceback" not in errors


def write_images(root: Path, number: int, **sizes: int) -> list[str]:
    """Folders of random images, of one size a class; the options that read them."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, size in sizes.items():
            (root / split / label).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{index}.png")
    sets = "DATASETS.TRAIN ('root_train',) DATASETS.TEST ('root_test',) DATASETS.ROOT"
    return [*sets.split(), str(root)]


def test_a_folder_with_a_broken_image(run, tmp_path, capsys):
    """Skipped with its name, or fatal; sizes made one by INPUT.IMAGE_SIZE."""
    options = write_images(tmp_path / "data", 8, cat=10, dog=14)
    options += ["SOLVER.MAX_ITER", "2", "INPUT.IMAGE_SIZE", "8"]
    broken = tmp_path / "data/train/dog/3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert run(*options) == 0
    log = (tmp_path / "out/log.txt").read_text()
    assert str(broken) in log and "root_train: 15 images, 2 classes" in log
    assert {"accuracy-cat", "accuracy-dog"} <= lines(tmp_path / "out")[-1].keys()
    capsys.readouterr()
    assert run(*options, "DATASETS.ON_ERROR", "fatal") == 2
    assert str(broken) in capsys.readouterr().err


def test_a_test_image_that_breaks_late_ends_no_training(run, tmp_path):
    """Unverified, it is left out of the evaluation and of flow.png."""
    options = write_images(tmp_path / "data", 3, cat=8, dog=8)
    (tmp_path / "data/test/cat/0.png").write_bytes(b"no image")
    assert run(*options, "DATASETS.VERIFY_IMAGES", "never", "SOLVER.MAX_ITER", "1") == 0
    predictions = tmp_path / "out/inference/predictions.json"
    assert (tmp_path / "out/flow.png").exists() and len(predictions.read_text().splitlines()) == 5


def test_a_checkpoint_needs_the_pretrained_file_no_more(run, tmp_path, capsys):
    import timm

    weights = tmp_path / "timm.pth"
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    torch.save(
        timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=5, **shape).state_dict(), weights
    )
    options = ["MODEL.CLASSIFIER.BACKBONE", "timm", "MODEL.CLASSIFIER.TIMM.WEIGHTS", str(weights)]
    options += ["MODEL.CLASSIFIER.TIMM.OPTIONS", json.dumps([f"{key}={n}" for key, n in shape.items()])]
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
    frozen = ["SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "1e-30"]
    assert run(*frozen, "UPDATE.METHOD", "backprop") == 0
    (out / "model_final.pth").rename(start)
    old = torch.load(start, weights_only=True)["model"]
    assert old["temperature"] == 1
    assert run(*frozen, "MODEL.WEIGHTS", str(start)) == 0
    (out / "model_final.pth").rename(start)
    new = torch.load(start, weights_only=True)["model"]
    assert new["temperature"].item() == pytest.approx(0.1)
    name = "backbone.stages.0.0.first.0.weight"
    assert torch.equal(new[name], old[name])


def test_weights_that_match_nothing_are_refused(run, tmp_path, capsys):
    """Of another network altogether; the batch norms' counters, which torch does not miss, match nothing."""
    torch.save({"other.weight": torch.ones(3)}, tmp_path / "other.pth")
    assert run("MODEL.WEIGHTS", str(tmp_path / "other.pth")) == 2
    assert "other.pth matches this model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flow", "backprop"])
def test_the_digits_are_learned(tmp_path, method):
    """The config as it is: at least 97 %."""
    arguments = ["--config-file", CONFIG, "OUTPUT_DIR", str(tmp_path), "UPDATE.METHOD", method]
    assert run_command(arguments) == 0
    assert lines(tmp_path)[-1]["accuracy"] >= 97.0
