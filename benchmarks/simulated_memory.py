"""A training step on tensors without data: how much memory it would take where there is no room for it.

For benchmarks/memory.py --device simulate, which says what is counted.
"""

import contextlib
from collections.abc import Sequence

import torch

from dfm_d2.local_update import block_optimizer
from dfm_d2.local_update import updates as local_update

MIB = 2**20


def simulate(model: torch.nn.Module, batch: list[dict], update) -> dict[str, float]:
    """MiB by kind at the peak of a step on tensors without data, and at the peak of activations."""
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.utils._pytree import tree_map_only

    def without_data(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    prepared = model.prepare(batch, 0)
    images = type(prepared.images)(without_data(prepared.images.tensor), prepared.images.image_sizes)
    prepared = tree_map_only(torch.Tensor, without_data, prepared._replace(images=None))
    model = model.to("meta")
    optimizer = block_optimizer.BlockOptimizer(
        model.blocks(),
        lambda groups: torch.optim.AdamW(groups, foreach=False),
        lambda name, parameter: {"lr": 1e-4},
    )
    # Meta tensors have no values that could fail these.
    local_update.check_finite = block_optimizer._check_norms = lambda values: None

    def step() -> None:
        inputs = prepared._replace(images=images, inputs=list(prepared.inputs))
        update.step(model, inputs, optimizer, contextlib.nullcontext)

    step()  # makes the optimizer's state
    optimizer.zero_grad(set_to_none=True)
    meta, leaves = torch.device("meta"), []
    at_peak = dict.fromkeys(("total", "features", "parameters"), 0)
    block_losses, parameters = model.block_losses, list(model.parameters())

    def noticed(index, features, prepared):
        leaves[:] = features
        return block_losses(index, features, prepared)

    class Tracker(MemTracker):
        """Notices how much of the peak is gradients: those that predictors add up in the features, and those
        of the parameters."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            answer = super().__torch_dispatch__(func, types, args, kwargs)
            total = self.get_tracker_snapshot("peak")[meta]["Total"]
            if total > at_peak["total"]:
                features = [x for x in leaves if x.is_leaf]
                at_peak.update(
                    total=total, features=gradient_bytes(features), parameters=gradient_bytes(parameters)
                )
            return answer

    model.block_losses = noticed
    tracker = Tracker()
    # It would follow the modules, and fails where a backward runs within a forward, as that of a stage does.
    tracker._mod_tracker = _NoModules()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    peak = tracker.get_tracker_snapshot("peak")[meta]
    kinds = {str(getattr(kind, "value", kind)): size / MIB for kind, size in peak.items()}
    feature_gradients, gradients = at_peak["features"] / MIB, at_peak["parameters"] / MIB
    return {
        "activations": kinds["Activation"] + kinds["Temp"] - feature_gradients - gradients,
        "feature gradients": feature_gradients,
        "gradients": gradients,
        "parameters": kinds["Parameter"],
        "optimizer state": kinds["Optstate"],
        "total": kinds["Total"],
    }


def gradient_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the gradients that tensors have."""
    return sum(x.grad.numel() * x.grad.element_size() for x in tensors if x.grad is not None)


class _NoModules(contextlib.nullcontext):
    """In the place of MemTracker's own tracker of modules: who allocates a tensor is not asked here."""

    parents: frozenset[str] = frozenset()
    is_bw = False

    def register_user_hooks(self, *_) -> None:
        """Nothing calls them."""

    def clear_user_hooks(self) -> None:
        """There are none."""
