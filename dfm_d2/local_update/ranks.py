"""Predictors shared out among processes (docs/scaling.md).

A process evaluates its own predictors on the images of its whole row (ProcessGrid). Features are broadcast
within the row, their gradients are reduced to the process that they come from, and what predictors tell each
other, detached, goes to the whole row. Besides, a row exchanges the ground truth of its
images. Shapes: L levels, B images of the row, C channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dfm_d2.local_update.blocks import BlockLosses, predictor_index
from dfm_d2.local_update.hand_over import Answer, HandOver, Leaves, OwnLosses
from dfm_d2.local_update.processes import ProcessGrid, among, gather_objects
from dfm_d2.local_update.updates import SequentialUpdate


class RanksUpdate(SequentialUpdate):
    """As sequential, over the predictors that this process owns.

    Predictors are owned in turns and answers leave before the backward begins, so that a chain of predictors
    is a pipeline: while one is in its backward the next one, elsewhere, is in its forward.
    """

    def __init__(self, grid: ProcessGrid, step_in_backward: bool = False):
        super().__init__(step_in_backward)
        self.grid = grid
        self._counts: list[int] = []

    def of_row(self, batch: list[dict]) -> list[dict]:
        """The images of the row, in the order of its members; those of others are without pixels.

        To be called on the batch of each process before ``prepare`` sees it.
        """
        told = [{**item, "image": tuple(item["image"].shape)} for item in batch]
        shares = gather_objects(told, self.grid.host)
        self._counts = [len(share) for share in shares]
        for item in (item for share in shares for item in share):  # as large as the image, and of one number
            item["image"] = torch.zeros((), dtype=torch.uint8).expand(item["image"])
        shares[self.grid.member] = batch
        return [item for share in shares for item in share]

    def hand_over(self) -> HandOver:
        return RankLeaves(self.grid, self._counts)


class RankLeaves(Leaves):
    """Leaves of the features of all images of the row, of which each member has computed its own.

    Args:
        counts: the number of images of each member. What is prepared has ``part(images: slice)``.
    """

    def __init__(self, grid: ProcessGrid, counts: Sequence[int]):
        super().__init__()
        self.grid = grid
        self._rows = [slice(end - count, end) for count, end in zip(counts, accumulate(counts))]
        self._sent: list[dist.Work] = []

    def own(self, prepared: Any) -> Any:
        return prepared.part(self._rows[self.grid.member])

    @torch.no_grad()
    def detached(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The features `(B, C, H_l, W_l)` of all images of the row."""
        parts = []
        for member, rows in enumerate(self._rows):
            if member == self.grid.member:
                part = [feature.detach() for feature in features]
            else:
                part = [x.new_empty((rows.stop - rows.start, *x.shape[1:])) for x in features]
            flat = _flatten_dense_tensors(part)
            dist.broadcast(flat, self.grid.first + member, group=self.grid.row)
            parts.append(_unflatten_dense_tensors(flat, part))
        whole = [torch.cat(level) for level in zip(*parts)]
        if features[0].is_contiguous():
            return whole
        return [level.contiguous(memory_format=torch.channels_last) for level in whole]

    def gradients(self, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """From all predictors of the row."""
        if not leaves[0].requires_grad:
            return [None] * len(leaves)
        gradients: list[Tensor | None] = []
        for member, rows in enumerate(self._rows):
            parts = [torch.zeros_like(x[rows]) if x.grad is None else x.grad[rows] for x in leaves]
            flat = _flatten_dense_tensors(parts)
            dist.reduce(flat, self.grid.first + member, group=self.grid.row)
            if member == self.grid.member:
                # A predictor's loss is averaged over W / G owners, the shared block's gradient over all W.
                gradients = list(_unflatten_dense_tensors(flat * self.grid.members, parts))
        return gradients

    def close(self, own: OwnLosses | None = None) -> Iterator[BlockLosses]:
        for work in self._sent:
            work.wait()
        return super().close(own)

    def owns(self, block: str) -> bool:
        return self.grid.owns(block)

    def among_owners(self, block: str) -> AbstractContextManager:
        return nullcontext() if predictor_index(block) is None else among(self.grid.replicas)

    def tell(self, index: int, answer: Answer | None, like: Answer) -> Answer:
        source = self.grid.first + self.grid.owner(index)
        told = [torch.empty_like(x) for x in like] if answer is None else [x.contiguous() for x in answer]
        works = [dist.broadcast(x, source, group=self.grid.row, async_op=True) for x in told]
        if answer is not None:
            self._sent += works
            return answer
        for work in works:
            work.wait()
        return type(like)(*told)
