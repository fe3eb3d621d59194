"""kill -9 at any moment and --resume: the training goes on as if nothing had happened."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_training import command, run
from torch.utils._pytree import keystr, tree_flatten_with_path
from toy_model import ToyModel, make_trainer, toy_loader

from dfm_d2.data.files import remove_partial_files
from dfm_d2.engine.checkpoint import CheckpointHook, SafeCheckpointer
from dfm_d2.engine.folder import WRITTEN
from dfm_d2.engine.metrics import METRICS_FILE, cut_back, read_metrics
from dfm_d2.framework import IterationTimer, JSONWriter, LRScheduler, PeriodicWriter, seed_all_rng

CLOCKS = ("time", "data_time", "eta_seconds")


def train_toy(folder: Path, max_iter: int = 60, loader=toy_loader, period: int = 5) -> None:
    """Train to ``max_iter``, resuming where ``folder`` has a checkpoint."""
    torch.set_num_threads(1)
    seed_all_rng(7)
    start, model = 0, ToyModel(noise=True)
    trainer = make_trainer(model, loader)
    trainer.register_hooks([IterationTimer(), LRScheduler()])
    checkpointer = SafeCheckpointer(model, str(folder), trainer=trainer)
    if checkpointer.has_checkpoint():
        checkpointer.resume_or_load("", resume=True)
        start = trainer.iter + 1
    remove_partial_files(folder, WRITTEN)
    if start >= max_iter:
        return  # it was killed between its last checkpoint and its exit
    cut_back(folder / METRICS_FILE, start)
    writers = [JSONWriter(str(folder / METRICS_FILE), window_size=4)]
    saving = CheckpointHook(checkpointer, period, 2, writers, log_period=4)
    trainer.register_hooks([PeriodicWriter(writers, 4), saving])
    with saving.signals:
        trainer.train(start, max_iter)


def slow_toy_loader(position: int):
    for batch in toy_loader(position):
        time.sleep(0.002)
        yield batch


def losses(folder: Path) -> list[dict]:
    """The lines of metrics.json without what a clock says."""
    entries = read_metrics(folder / METRICS_FILE)
    return [{key: value for key, value in entry.items() if key not in CLOCKS} for entry in entries]


def assert_same_run(one: Path, two: Path) -> None:
    """Every line of metrics.json, and every tensor and number of the last checkpoint, bit for bit."""
    assert losses(one) == losses(two)
    assert_same_checkpoint(one, two)


def assert_same_checkpoint(one: Path, two: Path) -> None:
    checkpoints = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (one, two)]
    for checkpoint in checkpoints:
        del checkpoint["dfm_d2"]["config"]  # names its own OUTPUT_DIR
    (found, form), (expected, expected_form) = map(tree_flatten_with_path, checkpoints)
    assert form == expected_form
    for (path, a), (_, b) in zip(found, expected):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, keystr(path)


def wait_for_changes(path: Path, number: int, limit: float = 20.0) -> None:
    """Wait until ``path`` was written ``number`` times, at most ``limit`` seconds."""
    end, seen = time.monotonic() + limit, set()
    while len(seen) <= number and time.monotonic() < end:
        seen.add(path.stat().st_mtime_ns if path.exists() else 0)
        time.sleep(0.001)


def test_killed_and_resumed_equals_uninterrupted(server, tmp_path):
    """Children are killed at random moments, from their start-up to the middle of a checkpoint, and the next
    one resumes."""
    straight, killed, threads = tmp_path / "straight", tmp_path / "killed", torch.get_num_threads()
    straight.mkdir()
    killed.mkdir()
    train_toy(straight)
    torch.set_num_threads(threads)
    moments, last, statuses = random.Random(0), killed / "last_checkpoint", []
    while not statuses or statuses[-1] != 0:
        child = server.Process(target=train_toy, args=(killed, 60, slow_toy_loader))
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
    loader = mock.Mock(side_effect=toy_loader)
    for max_iter in (7, 9):
        train_toy(tmp_path, max_iter, loader)
    assert loader.mock_calls == [mock.call(0), mock.call(28)]


@pytest.mark.slow
def test_train_net_killed_and_resumed_equals_uninterrupted(shapes, tmp_path):
    """The real command on generated images, killed at random moments."""
    options = ["SOLVER.MAX_ITER=24", "SOLVER.IMS_PER_BATCH=2", "SOLVER.CHECKPOINT_PERIOD=4"]
    options += ["TEST.EVAL_PERIOD=8", "SOLVER.OPTIMIZER=adamw"]
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
