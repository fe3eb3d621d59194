"""Train the toy; for the tests of resuming."""

import time
from pathlib import Path

import torch
from toy_model import ToyModel, make_trainer, toy_loader

from dfm_d2.engine.checkpoint import CheckpointHook, SafeCheckpointer
from dfm_d2.engine.metrics import METRICS_FILE, cut_back
from dfm_d2.framework import IterationTimer, JSONWriter, LRScheduler, PeriodicWriter, seed_all_rng


def train_toy(folder: Path, max_iter: int = 60, pause: float = 0.0, loader=toy_loader) -> None:
    """Train to ``max_iter``, resuming where ``folder`` has a checkpoint."""
    torch.set_num_threads(1)
    seed_all_rng(7)
    model = ToyModel(noise=True)
    trainer = make_trainer(model, loader)
    trainer.register_hooks([IterationTimer(), LRScheduler()])
    checkpointer = SafeCheckpointer(model, str(folder), trainer=trainer)
    start = 0
    if checkpointer.has_checkpoint():
        checkpointer.resume_or_load("", resume=True)
        start = trainer.iter + 1
    if start >= max_iter:
        return  # it was killed between its last checkpoint and its exit
    cut_back(folder / METRICS_FILE, start)
    writers = [JSONWriter(str(folder / METRICS_FILE), window_size=4)]
    trainer.register_hooks([PeriodicWriter(writers, 4), CheckpointHook(checkpointer, 5, 2, writers)])
    run_step = trainer.run_step

    def slow_step() -> None:
        run_step()
        time.sleep(pause)

    trainer.run_step = slow_step
    trainer.train(start, max_iter)
