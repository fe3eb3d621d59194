"""The update modes: who does the backward of which block when (DESIGN section 2; docs/math.md, section 5).

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
from dfm_d2.local_update.errors import NonFiniteLossError
from dfm_d2.local_update.hand_over import HandOver, Leaves
from dfm_d2.local_update.processes import (
    current_processes,
    is_true_anywhere,
    mean_over_processes,
    of_all_processes,
)

Autocast = Callable[[], AbstractContextManager]


def check_finite(losses: dict[str, Tensor]) -> None:
    """NonFiniteLossError naming each entry that is a loss and not finite. One transfer from the device.

    All processes raise where one has such a loss, or the others would wait for it.
    """
    keys = [key for key in losses if key.startswith("loss")]
    values = torch.stack([losses[key].detach().double() for key in keys]).tolist()
    bad = {key: value for key, value in zip(keys, values) if not abs(value) < float("inf")}
    if is_true_anywhere(bool(bad), losses[keys[0]].device):
        raise NonFiniteLossError(of_all_processes(bad), raised_by=current_processes())


class Update(ABC):
    """A way of updating the blocks of a model."""

    @abstractmethod
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

    def of_all_processes(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """What ``step`` returned, as numbers: the means over the processes, which all have the same keys."""
        values = torch.stack([value.detach().double() for value in metrics.values()])
        return dict(zip(metrics, mean_over_processes(values).tolist()))

    def share(self, batch: list[dict]) -> list[dict]:
        """The batch that ``prepare`` is to see, of the one that this process has loaded."""
        return batch


class JointUpdate(Update):
    """All losses summed and one backward: the reference that the local updates are compared with.

    Optimizer, clipping and fp16 skip are per block all the same (see ``BlockOptimizer``).

    Args:
        together: predictors are evaluated as one batched computation on a GPU: faster where launches or small
            products are what takes the time. A CPU is slower at many small products than at few large ones
            (docs/memory.md) and takes them one by one.
    """

    def __init__(self, together: bool = False):
        self.together = together

    def step(
        self,
        model: LocallyTrainable,
        prepared: Any,
        optimizer: BlockOptimizer,
        autocast: Autocast = nullcontext,
    ) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        together = self.together and next(model.parameters()).is_cuda
        losses = attached_losses(model, prepared, autocast, together)
        check_finite(losses)
        optimizer.scale(sum_losses(losses)).backward()
        optimizer.step()
        return _detached(losses) | norms(optimizer)


class SequentialUpdate(Update):
    """Block by block: forward, loss, backward and the graph is freed before the next block starts.

    Args:
        step_in_backward: a block is stepped, and its gradients are freed, before the next starts.
    """

    def __init__(self, step_in_backward: bool = False):
        self.step_in_backward = step_in_backward

    def step(
        self,
        model: LocallyTrainable,
        prepared: Any,
        optimizer: BlockOptimizer,
        autocast: Autocast = nullcontext,
    ) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, Tensor] = {}
        for item in _items(model.block_losses(prepared, self.hand_over()), autocast):
            self.backward(item, optimizer)
            metrics |= _detached(item.losses)
            del item  # nothing but the model's next block is to be alive while that is computed
        check_finite(metrics)
        optimizer.step()
        return metrics | norms(optimizer)

    def hand_over(self) -> HandOver:
        """Of a new step."""
        return Leaves()

    def backward(self, item: BlockLosses, optimizer: BlockOptimizer) -> None:
        """Backward of one item; on return nothing but the item references its graph."""
        # What is carried has the loss scale of fp16 already.
        roots = [optimizer.scale(sum_losses(item.losses))] if item.losses else []
        torch.autograd.backward(roots if item.carried is None else [*roots, item.carried])
        if item.carried is not None:
            return  # the shared block is stepped last, with all that other blocks left for it
        for block in item.blocks:
            optimizer.reduce_block(block)
        if self.step_in_backward:
            check_finite(item.losses)
            for block in item.blocks:
                optimizer.step_block(block)
                optimizer.zero_block(block)


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


def _detached(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in losses.items()}


def norms(optimizer: BlockOptimizer) -> dict[str, Tensor]:
    """``grad_norm/<block>`` of the blocks that were stepped."""
    return {f"grad_norm/{block}": norm for block, norm in optimizer.norms.items()}


def build_update(name: str, step_in_backward: bool = False) -> Update:
    """The update of ``MODEL.DFM.{UPDATE, STEP_IN_BACKWARD}``; ``step_in_backward`` is sequential's."""
    if name == "sequential":
        return SequentialUpdate(step_in_backward)
    return JointUpdate(together=name == "parallel")
