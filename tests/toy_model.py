"""A locally trainable model small enough to train in milliseconds: B images, D predictors, C channels."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dfm_d2.framework import get_cfg
from dfm_d2.local_update import BlockLosses, HandOver, predictor_block

CHANNELS = 6


@dataclass
class ToyPrepared:
    images: Tensor  # (B, 3, 8, 8)
    targets: Tensor  # (B, D)


class ToyBackbone(nn.Module):
    """Named as a Detectron2 FPN is, so that rules by parameter name can be tested."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom_up = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3, padding=1), nn.GroupNorm(2, CHANNELS), nn.ReLU()
        )
        self.fpn = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.bottom_up(images)
        return [fine, self.fpn(fine)]


class ToyModel(nn.Module):
    """D multilayer perceptrons on pooled features. ``noise``: draw from every global generator."""

    def __init__(self, num_predictors: int = 3, noise: bool = False) -> None:
        super().__init__()
        self.num_predictors = num_predictors
        self.noise = noise
        self.backbone = ToyBackbone()
        self.predictors = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * CHANNELS, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 1))
            for _ in range(num_predictors)
        )
        self.seen: list[tuple[int, int]] = []

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        blocks: dict = {"shared": []} | {predictor_block(d): [] for d in range(self.num_predictors)}
        for name, parameter in self.named_parameters():
            owner = predictor_block(int(name.split(".")[1])) if name.startswith("predictors") else "shared"
            blocks[owner].append((name, parameter))
        return blocks

    def prepare(self, batched_inputs: list[dict], iteration: int) -> ToyPrepared:
        dtype = next(self.parameters()).dtype
        images = torch.stack([item["image"] for item in batched_inputs]).to(dtype)
        factors = torch.arange(1, self.num_predictors + 1, device=images.device)
        targets = images.mean(dim=(1, 2, 3))[:, None] * factors
        if self.noise:
            targets = targets + random.random() + np.random.rand() + torch.rand(1)
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
        error = self.predictors[index](pooled)[:, 0].float() - prepared.targets[:, index].float()
        if prepared.images.dtype == torch.float64:
            error = self.predictors[index](pooled)[:, 0] - prepared.targets[:, index]
        name = predictor_block(index)
        return {
            f"loss_square/{name}": error.square().mean(),
            f"loss_absolute/{name}": 0.5 * error.abs().mean(),
            f"error/{name}": error.detach().abs().max(),
        }


def toy_item(position: int) -> dict:
    """Sample ``position`` of the toy stream, a pure function of the position."""
    generator = torch.Generator().manual_seed(position)
    return {"image_id": f"toy{position}", "image": torch.randn(3, 8, 8, generator=generator)}


def toy_loader(start_position: int, batch_size: int = 4):
    """The endless stream of toy batches from a position on."""
    position = start_position
    while True:
        yield [toy_item(position + i) for i in range(batch_size)]
        position += batch_size


def toy_config(**solver):
    """Detectron2's config with ours and some SOLVER keys set."""
    from dfm_d2.config import add_dfm_config

    cfg = get_cfg()
    add_dfm_config(cfg)
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WARMUP_ITERS = 3
    cfg.SOLVER.MAX_ITER = 60
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg
