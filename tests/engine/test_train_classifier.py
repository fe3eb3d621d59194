"""tools/train_classifier.py: training, evaluation, pictures, resume, and one sentence for what is wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import assert_same_checkpoint, losses

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/digits_flow_cnn.yaml")
TOOL = str(ROOT / "tools/train_classifier.py")
TINY = (
    "SEED 1 SOLVER.IMS_PER_BATCH 16 SOLVER.LOG_PERIOD 1 TEST.EVAL_PERIOD 0 SOLVER.WARMUP_ITERS 0 "
    "MODEL.CLASSIFIER.CNN.CHANNELS (8,8) MODEL.CLASSIFIER.CNN.STRIDES (2,1) MODEL.CLASSIFIER.HIDDEN_DIM 16"
).split()


@pytest.fixture(scope="module")
def tool():
    """tools/train_classifier.py as a module."""
    spec = importlib.util.spec_from_file_location("train_classifier", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, tmp_path):
    def command(*opts: str, flags: tuple[str, ...] = ()) -> int:
        return tool.run_command(
            ["--config-file", CONFIG, *flags, *TINY, "OUTPUT_DIR", str(tmp_path / "out"), *opts]
        )

    return command


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


METHODS = ("flow", "backprop", "forward_forward", "stochastic_forward_forward")


@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_and_draw(run, tmp_path, method, capsys):
    out = tmp_path / "out"
    options = ["UPDATE.METHOD", method, "DATASETS.HOLD_OUT", "0.1"]
    assert run(*options, "SOLVER.MAX_ITER", "3") == 0
    last = lines(out)[-1]
    assert {"accuracy", "nll", "ece", "accuracy-7"} <= last.keys()
    assert 0 <= last["accuracy"] <= 100
    expected = {"model_final.pth", "config.yaml", "curves.png", "log.txt", "inference"}
    assert (expected | ({"flow.png"} if method == "flow" else set())) <= set(os.listdir(out))
    assert list(out.glob("events.out.tfevents.*"))
    assert "fitted on 144 held-out images" in (out / "log.txt").read_text()
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


def test_killed_and_resumed_equals_uninterrupted(provider, tmp_path):
    """Killed right after a checkpoint, within an epoch: the same metrics and weights, bit for bit."""
    options = [*TINY, "SOLVER.MAX_ITER", "9", "DATASETS.HOLD_OUT", "0.1", "SOLVER.CHECKPOINT_PERIOD", "4"]
    options += ["TEST.EVAL_PERIOD", "3"]
    driver = [sys.executable, str(Path(__file__).parent / "killed_classifier.py"), str(tmp_path)]
    done = subprocess.run(
        [*driver, "--config-file", CONFIG, "--resume", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DFM_FRAMEWORK": provider},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ends = [line for line in done.stderr.splitlines() if line.startswith(("straight", "killed"))]
    assert ends == ["straight 0", "killed 9", "killed 0"]
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")
    one, two = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("straight", "killed")
    )
    for checkpoint in (one, two):
        del checkpoint["dfm_d2"]["config"]  # names its own OUTPUT_DIR
    assert_same_checkpoint(one, two)


# Overrides, and a part of what is said about them.
CASES = {
    "UPDATE.METHOD hebb": "UPDATE.METHOD is 'hebb'; choose one of flow, backprop",
    "DATASETS.TRAIN ('imagenet_train',)": "Unknown data set 'imagenet_train'",
    "DATASETS.TEST ('digits_val',)": "Unknown data set 'digits_val'",
    "DATASETS.TRAIN ('root_train',)": "needs DATASETS.ROOT",
    "DATASETS.TRAIN ('root_train',) DATASETS.ROOT /nowhere": "/nowhere, which is missing",
    "INPUT.RANDOM_SHIFT 8": "INPUT.RANDOM_SHIFT is 8, but digits[",
    "MODEL.DFM.NUM_CLASSES 3": "MODEL.DFM.NUM_CLASSES is 3",
}


@pytest.mark.parametrize("given", CASES)
def test_what_the_user_can_put_right_is_one_line(run, capsys, given):
    assert run("SOLVER.MAX_ITER", "1", *given.split()) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1 and CASES[given] in errors and "Traceback" not in errors


def test_a_folder_with_a_broken_image(run, tmp_path, capsys):
    """Skipped with its name, or fatal; sizes made one by INPUT.IMAGE_SIZE."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, size in (("cat", 10), ("dog", 14)):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for index in range(8):
                pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    broken = tmp_path / "data/train/dog/3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = ["DATASETS.ROOT", str(tmp_path / "data"), "DATASETS.TRAIN", "('root_train',)"]
    options += ["DATASETS.TEST", "('root_test',)", "SOLVER.MAX_ITER", "2", "INPUT.IMAGE_SIZE", "8"]
    assert run(*options) == 0
    log = (tmp_path / "out/log.txt").read_text()
    assert str(broken) in log and "root_train: 15 images, 2 classes" in log
    assert {"accuracy-cat", "accuracy-dog"} <= lines(tmp_path / "out")[-1].keys()
    capsys.readouterr()
    assert run(*options, "DATASETS.ON_ERROR", "fatal") == 2
    assert str(broken) in capsys.readouterr().err


def test_a_test_image_that_breaks_late_ends_no_training(run, tmp_path):
    """Unverified, it is left out of the evaluation and of flow.png."""
    rng = np.random.default_rng(0)
    for split, label, index in np.ndindex(2, 2, 3):
        folder = tmp_path / "data" / ("train", "test")[split] / ("cat", "dog")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "data/test/cat/0.png").write_bytes(b"no image")
    options = ["DATASETS.ROOT", str(tmp_path / "data"), "DATASETS.TRAIN", "('root_train',)"]
    options += ["DATASETS.TEST", "('root_test',)", "DATASETS.VERIFY_IMAGES", "never", "SOLVER.MAX_ITER", "1"]
    assert run(*options) == 0
    assert (tmp_path / "out/flow.png").exists() and len(
        (tmp_path / "out/inference/predictions.json").read_text().splitlines()
    ) == 5


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
def test_the_digits_are_learned(tool, tmp_path, method):
    """The config as it is: at least 97 %."""
    arguments = ["--config-file", CONFIG, "OUTPUT_DIR", str(tmp_path), "UPDATE.METHOD", method]
    assert tool.run_command(arguments) == 0
    assert lines(tmp_path)[-1]["accuracy"] >= 97.0
