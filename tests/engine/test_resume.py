"""kill -9 at any moment and --resume: the training goes on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_model import toy_loader
from toy_training import train_toy

from dfm_d2.engine.metrics import METRICS_FILE, read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLOCKS = ("time", "data_time", "eta_seconds")


def losses(folder: Path) -> list[dict]:
    """The lines of metrics.json without what a clock says."""
    entries = read_metrics(folder / METRICS_FILE)
    return [{key: value for key, value in entry.items() if key not in CLOCKS} for entry in entries]


def assert_same_checkpoint(a, b, where="checkpoint") -> None:
    """Every tensor and number of two checkpoints, bit for bit."""
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_checkpoint(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b)):
            assert_same_checkpoint(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    straight.mkdir()
    killed.mkdir()
    command = [sys.executable, str(HERE / "toy_training.py"), str(straight), str(killed), "12"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"status {int(signal.SIGKILL)} at") >= 3, done.stdout
    assert f"status {int(signal.SIGKILL)} at model_0" in done.stdout, done.stdout
    assert losses(straight) == losses(killed)
    assert losses(straight)[-1]["iteration"] == 59
    one, two = (torch.load(folder / "model_final.pth", weights_only=True) for folder in (straight, killed))
    assert_same_checkpoint(one, two)
    assert not list(killed.glob("*.partial"))
    assert sorted(path.name for path in killed.glob("model_0*.pth")) == [
        "model_0000054.pth",
        "model_0000059.pth",
    ]


def test_the_stream_is_opened_where_training_stopped(tmp_path):
    opened = []

    def loader(position):
        opened.append(position)
        return toy_loader(position)

    train_toy(tmp_path, max_iter=7, loader=loader)
    train_toy(tmp_path, max_iter=9, loader=loader)
    assert opened == [0, 28]


@pytest.mark.slow
def test_train_net_killed_and_resumed_equals_uninterrupted(tmp_path):
    """The real command on generated images, killed at random moments."""
    shapes = tmp_path / "shapes"
    make = [sys.executable, str(ROOT / "tools/make_shapes.py"), "--out", str(shapes), "--size", "64"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run([*make, "--train", "20", "--val", "4"], env=environment, check=True, timeout=120)

    def command(name: str) -> list[str]:
        options = (
            f"OUTPUT_DIR {tmp_path / name} DATASETS.VOC_ROOT {shapes} SEED 3 SOLVER.MAX_ITER 24 "
            "SOLVER.IMS_PER_BATCH 2 SOLVER.CHECKPOINT_PERIOD 4 SOLVER.LOG_PERIOD 1 TEST.EVAL_PERIOD 8 "
            "SOLVER.EMA_DECAY 0.9 TEST.BEST_METRIC bbox_ema/AP50 MODEL.DEVICE cpu "
            "MODEL.DFM.NUM_PREDICTORS 2 MODEL.DFM.NUM_PROPOSALS 10"
        ).split()
        config = str(ROOT / "configs/shapes_flow_r18.yaml")
        train = str(ROOT / "tools/train_net.py")
        return [sys.executable, train, "--config-file", config, "--resume", *options]

    start = time.monotonic()
    subprocess.run(command("straight"), env=environment, check=True, timeout=500, capture_output=True)
    duration = time.monotonic() - start
    moments, kills = random.Random(1), 0
    for attempt in range(12):
        child = subprocess.Popen(
            command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            # The last attempts are left alone.
            wait = moments.uniform(0.3, 1.0) * duration if attempt < 4 else 500
            _, errors = child.communicate(timeout=wait)
            assert child.returncode == 0, errors.decode()
            break
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.communicate()
            kills += 1
    assert kills >= 1
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")
    last = json.loads((tmp_path / "killed" / METRICS_FILE).read_text().splitlines()[-1])
    assert {"bbox/AP50", "bbox/AP", "bbox_ema/AP50"} <= last.keys()
    one, two = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("straight", "killed")
    )
    for checkpoint in (one, two):
        del checkpoint["dfm_d2"]["config"]  # names its own OUTPUT_DIR
    assert_same_checkpoint(one, two)
