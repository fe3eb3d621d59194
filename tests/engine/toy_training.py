"""Train the toy; for the tests of resuming."""

import contextlib
import time
from pathlib import Path

import torch
from toy_model import ToyModel, toy_config, toy_loader

from dfm_d2.engine.checkpoint import CheckpointHook, SafeCheckpointer
from dfm_d2.engine.ema import EMAHook, ModelEMA
from dfm_d2.engine.metrics import METRICS_FILE, cut_back
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.engine.trainer import LocalUpdateTrainer
from dfm_d2.framework import (
    IterationTimer,
    JSONWriter,
    LRScheduler,
    PeriodicWriter,
    build_lr_scheduler,
    seed_all_rng,
)
from dfm_d2.local_update import build_update


def train_toy(folder: Path, max_iter: int = 60, pause: float = 0.0, loader=toy_loader) -> None:
    """Train to ``max_iter``, resuming where ``folder`` has a checkpoint."""
    torch.set_num_threads(1)
    seed_all_rng(7)
    cfg, model = toy_config(), ToyModel(noise=True).train()
    optimizer = build_block_optimizer(cfg, model)
    update = build_update("sequential")
    trainer = LocalUpdateTrainer(
        model, loader, optimizer, update, contextlib.nullcontext, images_per_step=4, window=4
    )
    trainer.scheduler = build_lr_scheduler(cfg, optimizer)
    ema = ModelEMA(model, 0.9)
    trainer.register_hooks([IterationTimer(), LRScheduler(), EMAHook(ema)])
    checkpointer = SafeCheckpointer(model, str(folder), trainer=trainer, ema=ema)
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
