"""The update modes: who does the backward of which block when (docs/math.md, section 5).

Every mode drives the one generator of a model, ``block_losses``, and they give the same gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dfm_d2.local_update.block_optimizer import BlockOptimizer
from dfm_d2.local_update.blocks import BlockLosses, LocallyTrainable, sum_losses
from dfm_d2.local_update.hand_over import HandOver, Leaves
from dfm_d2.local_update.processes import check_finite, current_processes

Autocast = Callable[[], AbstractContextManager]


class Update(ABC):
    """A way of updating the blocks of a model."""

    def step(
        self,
        model: LocallyTrainable,
        prepared: Any,
        optimizer: BlockOptimizer,
        autocast: Autocast = nullcontext,
    ) -> dict[str, Tensor]:
        """One iteration. Returns detached scalars: the losses, metrics and ``grad_norm/<block>``.

        Raises NonFiniteLossError before any parameter is changed; where blocks are stepped one by one, before
        the offending block is changed.
        """
        optimizer.zero_grad(set_to_none=True)
        metrics = self.backward(model, prepared, optimizer, autocast)
        check_losses(metrics)
        optimizer.step()
        return metrics | {f"grad_norm/{block}": norm for block, norm in optimizer.norms.items()}

    @abstractmethod
    def backward(
        self, model: LocallyTrainable, prepared: Any, optimizer: BlockOptimizer, autocast: Autocast
    ) -> dict[str, Tensor]:
        """Forward and backward of every block; returns the losses and metrics, detached."""


class JointUpdate(Update):
    """All losses summed and one backward: the reference that the local updates are compared with.

    Optimizer, clipping and fp16 skip are per block all the same (see ``BlockOptimizer``).

    Args:
        together: predictors are evaluated as one batched computation; None: on a GPU, where launches and
            small products are what takes the time. A CPU is slower that way (docs/memory.md).
    """

    def __init__(self, together: bool | None = False):
        self.together = together

    def backward(
        self, model: LocallyTrainable, prepared: Any, optimizer: BlockOptimizer, autocast: Autocast
    ) -> dict[str, Tensor]:
        together = next(model.parameters()).is_cuda if self.together is None else self.together
        losses = attached_losses(model, prepared, autocast, together)
        optimizer.scale(sum_losses(losses)).backward()
        return {key: value.detach() for key, value in losses.items()}


class SequentialUpdate(Update):
    """Block by block: forward, loss, backward and the graph is freed before the next block starts.

    Args:
        step_in_backward: a block is stepped, and its gradients are freed, before the next starts.
    """

    def __init__(self, step_in_backward: bool = False):
        self.step_in_backward = step_in_backward

    def backward(
        self, model: LocallyTrainable, prepared: Any, optimizer: BlockOptimizer, autocast: Autocast
    ) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        hand_over = self.hand_over()
        for item in _items(model.block_losses(prepared, hand_over), autocast):
            # What is carried has the loss scale of fp16 already.
            roots = [optimizer.scale(sum_losses(item.losses))] if item.losses else []
            torch.autograd.backward(roots if item.carried is None else [*roots, item.carried])
            losses = {key: value.detach() for key, value in item.losses.items()}
            metrics |= losses
            # What carries is stepped last, with all that other blocks left for it.
            blocks = item.blocks if item.carried is None else ()
            del item, roots  # nothing but the next block is to be alive while that is computed
            for block in blocks:
                optimizer.reduce_block(block)
            if self.step_in_backward and blocks:
                with hand_over.among_owners(blocks[0]):
                    check_losses(losses)
                for block in blocks:
                    optimizer.step_block(block)
        return metrics

    def hand_over(self) -> HandOver:
        """Of a new step."""
        return Leaves()


def check_losses(losses: dict[str, Tensor]) -> None:
    """NonFiniteLossError naming each loss that is not finite, in all of the current processes."""
    losses = {key: value for key, value in losses.items() if key.startswith("loss")}
    check_finite(losses, current_processes())


def attached_losses(
    model: LocallyTrainable, prepared: Any, autocast: Autocast = nullcontext, together: bool = False
) -> dict[str, Tensor]:
    """The losses and metrics of all blocks, on one graph."""
    losses: dict[str, Tensor] = {}
    for item in _items(model.block_losses(prepared, HandOver(together)), autocast):
        losses |= item.losses
    return losses


def _items(items: Iterator[BlockLosses], autocast: Autocast) -> Iterator[BlockLosses]:
    """Each computed in a fresh autocast context: one for all keeps the casted weights of all blocks alive."""
    while True:
        with autocast():
            item = next(items, None)
        if item is None:
            return
        yield item
        del item


def build_update(name: str, step_in_backward: bool = False) -> Update:
    """The update "joint", "sequential" or "parallel"; ``step_in_backward`` is sequential's."""
    if name == "sequential":
        return SequentialUpdate(step_in_backward)
    return JointUpdate(together=None if name == "parallel" else False)
