"""A training step of a detector on meta tensors under torch.distributed's MemTracker.

Every tensor's bytes over time and nothing else (no rounding, of the CUDA allocator to 512 bytes a tensor; no
workspace of cuDNN), at the peak of their total. "activations" are all but the other kinds, temporaries too;
"feature gradients" is what the predictors add up in the features. AdamW is not fused. Of accumulation two
micro-batches are taken, since the others repeat the second.
"""

import contextlib
import itertools
import weakref
from collections.abc import Sequence
from unittest.mock import MagicMock

import torch
from harness import MIB
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._pytree import tree_map_only

from dfm_d2.local_update import block_optimizer, updates


def mib_of(tensors: Sequence[torch.Tensor | None]) -> float:
    """MiB of those that are there."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None) / MIB


def simulate(model: nn.Module, update: updates.Update, prepared, accumulates: bool) -> dict[str, float]:
    """MiB by kind at the peak of the second step.

    Args:
        prepared: what the update takes; if it accumulates, an iterator over micro-batches.
    """

    def without_data(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    if accumulates:
        prepared = list(itertools.islice(prepared, 2))
    prepared = tree_map_only(torch.Tensor, without_data, prepared)
    model = model.to("meta")
    optimizer = block_optimizer.BlockOptimizer(
        model.blocks(), lambda named: torch.optim.AdamW(named, lr=1e-4, foreach=False)
    )
    # Meta tensors have no values that could fail these.
    updates.check_finite = block_optimizer.check_finite = lambda *_: None

    def step() -> None:
        update.step(model, prepared, optimizer, contextlib.nullcontext)

    step()  # makes the optimizer's state
    optimizer.zero_grad(set_to_none=True)
    meta, features = torch.device("meta"), []
    parameters = list(model.parameters())
    at_peak = dict.fromkeys(("total", "features", "parameters"), 0)

    def notice(_module, inputs: tuple) -> None:
        # To hold them would be a part of the memory. Where all predictors are batched, they get none.
        features[:] = map(weakref.ref, inputs[0] or ())

    for predictor in model.predictors:
        predictor.register_forward_pre_hook(notice)

    class Tracker(MemTracker):
        """Notices how much of the peak is gradients: those that predictors add up in the features, and those
        of the parameters."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            answer = super().__torch_dispatch__(func, types, args, kwargs)
            total = self.get_tracker_snapshot("peak")[meta]["Total"]
            if total > at_peak["total"]:
                leaves = [x for x in (feature() for feature in features) if x is not None and x.is_leaf]
                gradients = {"features": leaves, "parameters": parameters}
                mib = {name: mib_of([x.grad for x in tensors]) for name, tensors in gradients.items()}
                at_peak.update(mib, total=total)
            return answer

    tracker = Tracker()
    # What follows the modules fails where a backward runs within a forward, as that of a stage does; who
    # allocates a tensor is not asked here.
    tracker._mod_tracker = MagicMock(parents=frozenset(), is_bw=False)
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    peak = tracker.get_tracker_snapshot("peak")[meta]
    kinds = {str(getattr(kind, "value", kind)): size / MIB for kind, size in peak.items()}
    gradients = at_peak["features"] + at_peak["parameters"]
    return {
        "activations": kinds["Activation"] + kinds["Temp"] - gradients,
        "feature gradients": at_peak["features"],
        "gradients": at_peak["parameters"],
        "parameters": kinds["Parameter"],
        "optimizer state": kinds["Optstate"],
        "total": kinds["Total"],
    }
