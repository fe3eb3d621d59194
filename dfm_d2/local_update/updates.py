"""The training step, block by block (DESIGN section 2; docs/math.md, section 5).

Notation: L_d is the weighted loss of predictor d, F the features, theta_s the shared block.
With F' = detach(F), a leaf, each predictor's backward adds dL_d/dF' to the leaf's gradient, and

    dL/dtheta_s = (sum_d dL_d/dF')^T dF/dtheta_s        one backward through the backbone,

which is the gradient of the joint loss L = sum_d L_d, to rounding: L_d depends on theta_s only through F.
Backbone stages that are blocks of their own (BACKBONE_UPDATE "local") are updated as the features pass them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dfm_d2.flow import at_least_float32
from dfm_d2.local_update.block_optimizer import BlockOptimizer
from dfm_d2.local_update.blocks import predictor_block
from dfm_d2.local_update.data_parallel import current_processes, is_true_anywhere, of_all_processes
from dfm_d2.local_update.errors import NonFiniteLossError
from dfm_d2.local_update.processes import mean_over_processes

BACKBONE_UPDATES = ("accumulate", "frozen", "local")

Autocast = Callable[[], AbstractContextManager]
# Takes the name and the losses of a backbone stage that is a block, as soon as they are there.
OnStage = Callable[[str, dict[str, Tensor]], None]


@runtime_checkable
class LocallyTrainable(Protocol):
    """What a model offers so that its predictors can be trained one at a time. It is an ``nn.Module``."""

    num_predictors: int
    """D; 0 for classifiers, of which every block is a stage of the backbone."""
    is_local: bool
    """False where predictors depend on each other (the backprop cascade): then only "joint" works."""

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """{"shared": [...], "p0": [...], ...}: each trainable parameter, by its full name, exactly once.

        Backbone stages that are blocks come first, by their names; "shared" may be absent.
        """
        ...

    def prepare(self, batched_inputs: list[dict], iteration: int) -> Any:
        """Everything a step needs that has no gradient: images, targets, noise and t."""
        ...

    def extract_features(self, prepared: Any, on_stage: OnStage | None = None) -> list[Tensor]:
        """Forward of the shared block, and before it of the stages that are blocks, each given to
        ``on_stage``."""
        ...

    def block_losses(self, index: int, features: list[Tensor], prepared: Any) -> dict[str, Tensor]:
        """Weighted scalar losses of predictor ``index``; keys without the prefix "loss" are metrics."""
        ...

    def all_losses(self, features: list[Tensor], prepared: Any) -> dict[str, Tensor]:
        """The losses and metrics of all predictors."""
        ...

    def all_losses_together(self, features: list[Tensor], prepared: Any) -> dict[str, Tensor]:
        """As all_losses, evaluated as one batched computation."""
        ...


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """Sum of the entries whose key starts with "loss"; ValueError when there is none."""
    terms = [value for key, value in losses.items() if key.startswith("loss")]
    if not terms:
        raise ValueError(f"No entry of {sorted(losses)} starts with 'loss'.")
    return torch.stack([at_least_float32(term) for term in terms]).sum()


def check_finite(losses: dict[str, Tensor]) -> None:
    """NonFiniteLossError naming each entry that is a loss and not finite. One transfer from the device.

    All processes raise where one has such a loss, or the others would wait for it.
    """
    keys = [key for key in losses if key.startswith("loss")]
    values = torch.stack([losses[key].detach().double() for key in keys]).tolist()
    bad = {
        key: value
        for key, value in zip(keys, values)
        if value != value or value in (float("inf"), -float("inf"))
    }
    if is_true_anywhere(bool(bad), losses[keys[0]].device):
        raise NonFiniteLossError(of_all_processes(bad), raised_by=current_processes())


def _detached(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in losses.items()}


class Update(ABC):
    """A way of updating the blocks of a model."""

    needs_independent_predictors = True

    @abstractmethod
    def step(
        self, model: LocallyTrainable, prepared: Any, optimizer: BlockOptimizer, autocast: Autocast
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
    """

    needs_independent_predictors = False
    all_losses = "all_losses"

    def __init__(self, backbone_update: str = "accumulate"):
        """``backbone_update``: "accumulate" trains the shared block, "frozen" does not."""
        self.frozen = backbone_update == "frozen"

    def step(
        self, model: LocallyTrainable, prepared: Any, optimizer: BlockOptimizer, autocast: Autocast
    ) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        with torch.set_grad_enabled(not self.frozen), autocast():
            features = model.extract_features(prepared, lambda _, of_stage: losses.update(of_stage))
        with autocast():
            losses |= getattr(model, self.all_losses)(features, prepared)
        del features  # what the backward needs of them, the graph holds
        check_finite(losses)
        optimizer.scale(sum_losses(losses)).backward()
        optimizer.step()
        return _detached(losses) | norms(optimizer)


class ParallelUpdate(JointUpdate):
    """As joint, the predictors evaluated as one batched computation: faster where launches or small products
    are what takes the time, and with the activations of all of them at once."""

    needs_independent_predictors = True
    all_losses = "all_losses_together"


class SequentialUpdate(Update):
    """Block by block: forward, loss, backward and the graph is freed before the next block starts."""

    def __init__(self, backbone_update: str = "accumulate", step_in_backward: bool = False):
        """``step_in_backward``: a block is stepped, and its gradients are freed, before the next starts."""
        self.frozen = backbone_update == "frozen"
        self.step_in_backward = step_in_backward

    def step(
        self, model: LocallyTrainable, prepared: Any, optimizer: BlockOptimizer, autocast: Autocast
    ) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        features, metrics = self._features(model, prepared, optimizer, autocast)
        leaves = [feature.detach().requires_grad_(not self.frozen) for feature in features]
        for index in range(model.num_predictors):
            with autocast():
                losses = model.block_losses(index, leaves, prepared)
            metrics |= self._backward_block(predictor_block(index), losses, optimizer)
            del losses
        check_finite(metrics)
        gradients = [leaf.grad for leaf in leaves]
        del leaves
        backward_shared(features, gradients)
        optimizer.step()
        return metrics | norms(optimizer)

    def _features(
        self, model: LocallyTrainable, prepared: Any, optimizer: BlockOptimizer, autocast: Autocast
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The features, and the losses of the stages that were updated on the way."""
        metrics: dict[str, Tensor] = {}

        def end_stage(block: str, losses: dict[str, Tensor]) -> None:
            metrics.update(self._backward_block(block, losses, optimizer))
            torch.clear_autocast_cache()  # the casted weights of a stage end with it

        with torch.set_grad_enabled(not self.frozen), autocast():
            features = model.extract_features(prepared, end_stage)
        return features, metrics

    def _backward_block(
        self, block: str, losses: dict[str, Tensor], optimizer: BlockOptimizer
    ) -> dict[str, Tensor]:
        """Backward of one block; on return nothing but ``losses`` references its graph."""
        optimizer.scale(sum_losses(losses)).backward()
        found = _detached(losses)
        optimizer.reduce_block(block)
        if self.step_in_backward:
            check_finite(found)
            optimizer.step_block(block)
            optimizer.zero_block(block)
        return found


def backward_shared(features: list[Tensor], gradients: list[Tensor | None]) -> None:
    """One backward through the shared block, from the gradients that met in the features.

    Empties both lists: features and their gradients are freed as the backward goes on, as in a joint one.
    """
    pairs = [
        (feature, gradient)
        for feature, gradient in zip(features, gradients)
        if feature.requires_grad and gradient is not None
    ]
    features.clear()
    gradients.clear()
    if pairs:
        root = _HandOver.apply([gradient for _, gradient in pairs], *[feature for feature, _ in pairs])
        del pairs
        root.backward()


class _HandOver(torch.autograd.Function):
    """A scalar whose backward gives the features their gradients and keeps none of them.

    ``torch.autograd.backward(features, gradients)`` would hold all of both until its end.
    """

    @staticmethod
    def forward(ctx, gradients: list[Tensor], *features: Tensor) -> Tensor:
        ctx.gradients = gradients
        return features[0].new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple:
        gradients, ctx.gradients = ctx.gradients, []
        return None, *gradients


def _with_one_backward(update: type[JointUpdate]) -> Callable[[str, bool], JointUpdate]:
    def build(backbone_update: str, step_in_backward: bool) -> JointUpdate:
        if step_in_backward:
            raise ValueError(
                "MODEL.DFM.STEP_IN_BACKWARD needs MODEL.DFM.UPDATE sequential: joint and parallel have one "
                "backward."
            )
        return update(backbone_update)

    return build


# A new way of updating is one more line here; predictor_parallel.py has what needs several processes.
UPDATES: dict[str, Callable[[str, bool], Update]] = {
    "joint": _with_one_backward(JointUpdate),
    "sequential": SequentialUpdate,
    "parallel": _with_one_backward(ParallelUpdate),
}


def build_update(name: str, backbone_update: str, step_in_backward: bool) -> Update:
    """The update strategy of ``MODEL.DFM.{UPDATE, BACKBONE_UPDATE, STEP_IN_BACKWARD}``.

    Raises ValueError, listing the choices, for a value that is not known.
    """
    if name not in UPDATES:
        raise ValueError(f"MODEL.DFM.UPDATE is {name!r}; choose one of {', '.join(UPDATES)}.")
    if backbone_update not in BACKBONE_UPDATES:
        choices = ", ".join(BACKBONE_UPDATES)
        raise ValueError(f"MODEL.DFM.BACKBONE_UPDATE is {backbone_update!r}; choose one of {choices}.")
    return UPDATES[name](backbone_update, step_in_backward)


def norms(optimizer: BlockOptimizer) -> dict[str, Tensor]:
    """``grad_norm/<block>`` of the blocks that were stepped."""
    return {f"grad_norm/{block}": norm for block, norm in optimizer.norms.items()}
