"""Predictors shared out among processes (docs/scaling.md).

A process evaluates its own predictors on the images of its whole row (process_grid.py). Features are
broadcast within the row, their gradients are reduced to the process that they come from, and where predictors
train on-policy the detached boxes go to the owner of the next one. Besides, a row exchanges the ground truth
of its images. Shapes: L levels, B images of the row, C channels.
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from dfm_d2.local_update.block_optimizer import BlockOptimizer
from dfm_d2.local_update.blocks import predictor_block
from dfm_d2.local_update.process_grid import ProcessGrid
from dfm_d2.local_update.processes import among
from dfm_d2.local_update.updates import (
    Autocast,
    LocallyTrainable,
    SequentialUpdate,
    backward_shared,
    check_finite,
    norms,
)


@runtime_checkable
class Shareable(LocallyTrainable, Protocol):
    """A model whose predictors may be in several processes; what it prepares has ``part(images: slice)``."""

    def chained_inputs(self, prepared: Any) -> list[Tensor] | None:
        """The detached input of every predictor where each makes that of the next, which may be replaced;
        None where none needs another's."""
        ...


class PredictorParallelUpdate(SequentialUpdate):
    """As sequential, over the predictors that this process owns.

    Predictors are owned in turns and boxes leave before the backward begins, so that a chain of predictors is
    a pipeline: while one is in its backward the next one, elsewhere, is in its forward.
    """

    def __init__(self, grid: ProcessGrid, backbone_update: str, step_in_backward: bool):
        super().__init__(backbone_update, step_in_backward)
        self.grid = grid
        self._counts: list[int] = []

    def share(self, batch: list[dict]) -> list[dict]:
        """The images of the row, in the order of its members; those of others are without pixels."""
        told = [{**item, "image": tuple(item["image"].shape)} for item in batch]
        shares: list[list[dict]] = [[]] * self.grid.members
        dist.all_gather_object(shares, told, group=self.grid.host)
        self._counts = [len(share) for share in shares]
        for share in shares:
            for item in share:  # as large as the image, and of one number
                item["image"] = torch.zeros((), dtype=torch.uint8).expand(item["image"])
        shares[self.grid.member] = batch
        return [item for share in shares for item in share]

    def step(
        self, model: Shareable, prepared: Any, optimizer: BlockOptimizer, autocast: Autocast
    ) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        own = prepared.part(self._rows()[self.grid.member])
        features, metrics = self._features(model, own, optimizer, autocast)
        leaves = [leaf.requires_grad_(not self.frozen) for leaf in self._broadcast(features)]
        chain = model.chained_inputs(prepared)
        sent: list[dist.Work] = []
        for index in range(model.num_predictors):
            block = predictor_block(index)
            if not self.grid.owns(block):
                continue
            self._receive(index, chain)
            # Its losses are normalised, and checked, among the owners of this predictor.
            with among(self.grid.replicas):
                with autocast():
                    losses = model.block_losses(index, leaves, prepared)
                sent += self._send(index + 1, chain)
                metrics |= self._backward_block(block, losses, optimizer)
            del losses
        for work in sent:
            work.wait()
        check_finite(metrics)
        gradients = [] if self.frozen else self._reduce(leaves)
        del leaves
        backward_shared(features, gradients)
        optimizer.step()
        return metrics | norms(optimizer)

    def _rows(self) -> list[slice]:
        """The places of each member's images in the batch of the row."""
        ends = torch.tensor(self._counts).cumsum(0).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self._counts)]

    @torch.no_grad()
    def _broadcast(self, features: list[Tensor]) -> list[Tensor]:
        """The features `(B, C, H_l, W_l)` of all images of the row, of those of each member's own."""
        parts = []
        for member, count in enumerate(self._counts):
            shapes = [(count, *feature.shape[1:]) for feature in features]
            if member == self.grid.member:
                flat = torch.cat([feature.detach().reshape(-1) for feature in features])
            else:
                flat = features[0].new_empty(sum(torch.Size(shape).numel() for shape in shapes))
            dist.broadcast(flat, self.grid.first + member, group=self.grid.row)
            parts.append(_unflatten(flat, shapes))
        whole = [torch.cat(level) for level in zip(*parts)]
        if features[0].is_contiguous():
            return whole
        return [level.contiguous(memory_format=torch.channels_last) for level in whole]

    def _reduce(self, leaves: list[Tensor]) -> list[Tensor | None]:
        """The gradient of this process's own features, from all predictors of the row."""
        gradients: list[Tensor | None] = []
        for member, rows in enumerate(self._rows()):
            parts = [torch.zeros_like(x[rows]) if x.grad is None else x.grad[rows] for x in leaves]
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.reduce(flat, self.grid.first + member, group=self.grid.row)
            if member == self.grid.member:
                gradients = _unflatten(flat, [part.shape for part in parts])
        return gradients

    def _receive(self, index: int, chain: list[Tensor] | None) -> None:
        if chain is None or index == 0 or self.grid.owner(index - 1) == self.grid.member:
            return
        boxes = torch.empty_like(chain[index])
        dist.recv(boxes, self.grid.first + self.grid.owner(index - 1), group=self.grid.row)
        chain[index] = boxes

    def _send(self, index: int, chain: list[Tensor] | None) -> list[dist.Work]:
        if chain is None or index == len(chain) or self.grid.owner(index) == self.grid.member:
            return []
        to = self.grid.first + self.grid.owner(index)
        return [dist.isend(chain[index].contiguous(), to, group=self.grid.row)]

    def of_all_processes(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """What ``step`` returned, as numbers: of each name the mean over the processes that have it."""
        own = {key: float(value) for key, value in metrics.items()}
        gathered: list[dict[str, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        values: dict[str, list[float]] = {}
        for found in gathered:
            for key, value in found.items():
                values.setdefault(key, []).append(value)
        return {key: sum(found) / len(found) for key, found in values.items()}


def _unflatten(flat: Tensor, shapes: list) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes)]
