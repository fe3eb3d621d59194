"""A locally trainable model small enough to train in milliseconds: B images, D predictors, C channels."""

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dfm_d2.config import add_dfm_config
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.engine.trainer import LocalUpdateTrainer
from dfm_d2.flow import at_least_float32
from dfm_d2.framework import build_lr_scheduler, get_cfg
from dfm_d2.local_update import BlockLosses, HandOver, build_update, predictor_block

CHANNELS = 6
# What the tests call the update modes: arguments of build_update.
UPDATES = {mode: (mode,) for mode in ("joint", "parallel", "sequential")}
UPDATES["in backward"] = ("sequential", True)


class ToyPrepared(NamedTuple):
    images: Tensor  # (B, 3, 8, 8)
    targets: Tensor  # (B, D)


class ToyBackbone(nn.Module):
    """Named as a Detectron2 FPN is, so that rules by parameter name can be tested."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.bottom_up = nn.Sequential(convolution, nn.GroupNorm(2, CHANNELS), nn.ReLU())
        self.fpn = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.bottom_up(images)
        return [fine, self.fpn(fine)]


class ToyModel(nn.Module):
    """D multilayer perceptrons on pooled features. ``noise``: draw from every global generator."""

    backbone_prefix = "backbone.bottom_up"

    def __init__(self, num_predictors: int = 3, noise: bool = False) -> None:
        super().__init__()
        self.num_predictors, self.noise = num_predictors, noise
        self.backbone = ToyBackbone()
        self.predictors = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * CHANNELS, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 1))
            for _ in range(num_predictors)
        )

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        blocks: dict = {"shared": []} | {predictor_block(d): [] for d in range(self.num_predictors)}
        for name, parameter in self.named_parameters():
            owner = predictor_block(int(name.split(".")[1])) if name.startswith("predictors") else "shared"
            blocks[owner].append((name, parameter))
        return blocks

    def prepare(self, batched_inputs: list[dict], iteration: int) -> ToyPrepared:
        images = torch.stack([item["image"] for item in batched_inputs]).to(self.predictors[0][0].weight)
        factors = torch.arange(1, self.num_predictors + 1, device=images.device)
        targets = images.mean(dim=(1, 2, 3))[:, None] * factors
        if self.noise:
            targets = targets + random.random() + np.random.randn() + torch.rand(1)
        return ToyPrepared(images, targets)

    def block_losses(self, prepared: ToyPrepared, hand_over: HandOver) -> Iterator[BlockLosses]:
        features = hand_over.open(self.backbone(prepared.images))
        for index in range(self.num_predictors):
            yield BlockLosses((predictor_block(index),), self.losses_of(index, features, prepared))
        del features
        yield from hand_over.close()

    def losses_of(self, index: int, features: list[Tensor], prepared: ToyPrepared) -> dict[str, Tensor]:
        pooled = torch.cat([feature.mean(dim=(2, 3)) for feature in features], dim=1)
        if self.noise:
            pooled = nn.functional.dropout(pooled, 0.2)
        answer = at_least_float32(self.predictors[index](pooled)[:, 0])
        error = answer - at_least_float32(prepared.targets[:, index])
        name = predictor_block(index)
        return {
            f"loss_square/{name}": error.square().mean(),
            f"loss_absolute/{name}": 0.5 * error.abs().mean(),
            f"error/{name}": error.detach().abs().max(),
        }


def toy_loader(start_position: int, batch_size: int = 4):
    """The endless stream of toy batches from a position on; each sample is a pure function of its own."""
    for first in itertools.count(start_position, batch_size):
        samples = [(p, torch.Generator().manual_seed(p)) for p in range(first, first + batch_size)]
        yield [{"image_id": f"toy{p}", "image": torch.randn(3, 8, 8, generator=g)} for p, g in samples]


BATCH = next(toy_loader(0))


def toy_config(**solver):
    """Detectron2's config with ours and some SOLVER keys set."""
    cfg = get_cfg()
    add_dfm_config(cfg)
    cfg.SOLVER.update({"BASE_LR": 0.01, "WARMUP_ITERS": 3, "MAX_ITER": 60, "STEPS": (), **solver})
    return cfg


def make_toy(dtype: torch.dtype = torch.float32, **arguments) -> ToyModel:
    """The same one at every call."""
    torch.manual_seed(0)
    return ToyModel(**arguments).to(dtype)


def train_steps(
    model, update, inputs=BATCH, steps=1, start=0, optimizer=None, scaler=None,
    autocast=contextlib.nullcontext, **solver,
):  # fmt: skip
    """Train any model by one of UPDATES. Returns its optimizer (of SOLVER keys) and the last metrics."""
    optimizer = optimizer or build_block_optimizer(toy_config(**solver), model, scaler)
    strategy = build_update(*UPDATES[update])
    for iteration in range(start, start + steps):
        metrics = strategy.step(model, model.prepare(inputs, iteration), optimizer, autocast)
    return optimizer, metrics


def make_trainer(model, loader=toy_loader, update="sequential", images_per_step=4, **solver):
    """A trainer of any model, with a schedule and without hooks; the writers' window is of four steps."""
    cfg = toy_config(**solver)
    optimizer, strategy = build_block_optimizer(cfg, model), build_update(*UPDATES[update])
    parts = (model.train(), loader, optimizer, strategy, contextlib.nullcontext, images_per_step)
    trainer = LocalUpdateTrainer(*parts, window=4)
    trainer.scheduler = build_lr_scheduler(cfg, optimizer)
    return trainer


def moved(model, before: dict[str, Tensor]) -> set[str]:
    """The names of what is not what it was."""
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
