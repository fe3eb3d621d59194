"""Train the toy, and kill it; for the tests of resuming. Usage: toy_training.py STRAIGHT KILLED KILLS.

A forked child trains in the folder STRAIGHT without interruption. Then children train in the folder KILLED:
up to that many of them are killed (SIGKILL) at random moments, from their start-up to the middle of a
checkpoint, and the next one resumes.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from toy_model import ToyModel, toy_config, toy_loader  # noqa: E402

from dfm_d2.engine.checkpoint import CheckpointHook, SafeCheckpointer  # noqa: E402
from dfm_d2.engine.ema import ModelEMA  # noqa: E402
from dfm_d2.engine.hooks import EMAHook  # noqa: E402
from dfm_d2.engine.metrics import METRICS_FILE, cut_back  # noqa: E402
from dfm_d2.engine.optimizer import build_block_optimizer  # noqa: E402
from dfm_d2.engine.trainer import LocalUpdateTrainer  # noqa: E402
from dfm_d2.framework import (  # noqa: E402
    IterationTimer,
    JSONWriter,
    LRScheduler,
    PeriodicWriter,
    build_lr_scheduler,
    seed_all_rng,
)
from dfm_d2.local_update.updates import build_update  # noqa: E402


def train_toy(folder: Path, max_iter: int = 60, pause: float = 0.0, loader=toy_loader) -> LocalUpdateTrainer:
    """Train to ``max_iter``, resuming where ``folder`` has a checkpoint."""
    seed_all_rng(7)
    cfg = toy_config()
    model = ToyModel(noise=True)
    optimizer = build_block_optimizer(cfg, model)
    update = build_update("sequential", False)
    trainer = LocalUpdateTrainer(
        model, loader, optimizer, update, contextlib.nullcontext, images_per_step=4, window=4
    )
    ema = ModelEMA(model, 0.9)
    trainer.register_hooks(
        [IterationTimer(), LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer)), EMAHook(ema)]
    )
    checkpointer = SafeCheckpointer(model, str(folder), trainer=trainer, ema=ema)
    start = 0
    if checkpointer.has_checkpoint():
        checkpointer.resume_or_load("", resume=True)
        start = trainer.iter + 1
    cut_back(folder / METRICS_FILE, start)
    writers = [JSONWriter(str(folder / METRICS_FILE), window_size=4)]
    trainer.register_hooks([PeriodicWriter(writers, 4), CheckpointHook(checkpointer, 5, 2, writers)])
    model.train()
    run_step = trainer.run_step

    def slow_step() -> None:
        run_step()
        time.sleep(pause)

    trainer.run_step = slow_step
    trainer.train(start, max_iter)
    return trainer


def train_and_kill(folder: Path, kills: int) -> None:
    """Train in children until one comes to its end; up to ``kills`` of them are killed before that."""
    moments, killed, status = random.Random(0), 0, -1
    last = folder / "last_checkpoint"
    while status != 0:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            train_toy(folder, pause=0.002)
            os._exit(0)
        if killed < kills:
            killed += 1
            wait_for_changes(last, moments.randrange(3))
            time.sleep(moments.uniform(0.0, 0.05))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status not in (0, signal.SIGKILL):
            raise SystemExit(f"a child failed with status {status}")
        print(f"status {status} at {last.read_text() if last.exists() else 'no checkpoint'}", flush=True)


def wait_for_changes(path: Path, number: int, limit: float = 20.0) -> None:
    """Wait until ``path`` was written ``number`` times, at most ``limit`` seconds."""
    end = time.monotonic() + limit
    seen = path.stat().st_mtime_ns if path.exists() else 0
    while number > 0 and time.monotonic() < end:
        time.sleep(0.001)
        now = path.stat().st_mtime_ns if path.exists() else 0
        number -= now != seen
        seen = now


if __name__ == "__main__":
    train_and_kill(Path(sys.argv[1]), 0)
    train_and_kill(Path(sys.argv[2]), int(sys.argv[3]))
