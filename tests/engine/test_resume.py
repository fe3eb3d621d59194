"""kill -9 at any moment and --resume: the training goes on as if nothing had happened."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tiny_training import command, run
from toy_model import toy_loader
from toy_training import train_toy

from dfm_d2.engine.metrics import METRICS_FILE, read_metrics

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


def assert_same_run(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    checkpoints = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (one, two)]
    for checkpoint in checkpoints:
        del checkpoint["dfm_d2"]["config"]  # names its own OUTPUT_DIR
    assert_same_checkpoint(*checkpoints)


def wait_for_changes(path: Path, number: int, limit: float = 20.0) -> None:
    """Wait until ``path`` was written ``number`` times, at most ``limit`` seconds."""
    end = time.monotonic() + limit
    seen = path.stat().st_mtime_ns if path.exists() else 0
    while number > 0 and time.monotonic() < end:
        time.sleep(0.001)
        now = path.stat().st_mtime_ns if path.exists() else 0
        number -= now != seen
        seen = now


def test_killed_and_resumed_equals_uninterrupted(server, tmp_path):
    """Children are killed at random moments, from their start-up to the middle of a checkpoint, and the next
    one resumes."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    threads = torch.get_num_threads()
    train_toy(straight)
    torch.set_num_threads(threads)
    moments, last, statuses = random.Random(0), killed / "last_checkpoint", []
    while not statuses or statuses[-1] != 0:
        child = server.Process(target=train_toy, args=(killed,), kwargs={"pause": 0.002})
        child.start()
        if len(statuses) < 8:  # so that the last one has something left to train
            wait_for_changes(last, moments.randrange(3))
            time.sleep(moments.uniform(0.0, 0.05))
            child.kill()
        child.join()
        statuses.append(child.exitcode)
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode:
            told = last.read_text() if last.exists() else ""
    assert statuses.count(-signal.SIGKILL) >= 3 and told.startswith("model_0")
    assert losses(straight)[-1]["iteration"] == 59
    assert_same_run(straight, killed)
    assert not list(killed.glob("*.partial"))
    names = ["model_0000054.pth", "model_0000059.pth"]
    assert sorted(path.name for path in killed.glob("model_0*.pth")) == names


def test_the_stream_is_opened_where_training_stopped(tmp_path):
    opened = []

    def loader(position):
        opened.append(position)
        return toy_loader(position)

    train_toy(tmp_path, max_iter=7, loader=loader)
    train_toy(tmp_path, max_iter=9, loader=loader)
    assert opened == [0, 28]


@pytest.mark.slow
def test_train_net_killed_and_resumed_equals_uninterrupted(shapes, tmp_path):
    """The real command on generated images, killed at random moments."""
    options = (
        "SOLVER.MAX_ITER=24 SOLVER.IMS_PER_BATCH=2 SOLVER.CHECKPOINT_PERIOD=4 TEST.EVAL_PERIOD=8 "
        "SOLVER.OPTIMIZER=adamw"
    ).split()
    start = time.monotonic()
    run(command(shapes, tmp_path / "straight", "--resume", *options))
    duration = time.monotonic() - start
    moments, kills = random.Random(1), 0
    words = command(shapes, tmp_path / "killed", "--resume", *options)
    for _ in range(4):
        try:
            subprocess.run(words, capture_output=True, timeout=moments.uniform(0.3, 1.0) * duration)
        except subprocess.TimeoutExpired:  # it was killed
            kills += 1
    assert kills >= 1
    run(words)
    last = json.loads((tmp_path / "killed" / METRICS_FILE).read_text().splitlines()[-1])
    assert {"bbox/AP50", "bbox/AP"} <= last.keys()
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
