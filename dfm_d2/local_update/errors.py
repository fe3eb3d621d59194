"""Losses and gradients that are not finite: they end a training before they do damage."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dfm_d2.local_update.processes import gather_objects


class NonFiniteLossError(FloatingPointError):
    """A loss or the gradient of a block is infinite or not a number.

    Raised before any parameter of the iteration is stepped, or where blocks are stepped one by one before the
    offending block is stepped: the blocks before it have been, in memory only.
    """

    def __init__(
        self,
        values: Mapping[str, float],
        raised_by: dist.ProcessGroup | None = None,
        where: str = "",
        advice: str = "",
    ):
        """
        values: the offending entries by their key, such as ``{"loss_cls/predictor0": nan}``.
        raised_by: the processes that all raise it, each knowing its own images; None: this alone.
        where, advice: such as " at iteration 3", and what the user can do about it.
        """
        self.values = dict(values)
        self.raised_by = raised_by
        what = ", ".join(f"{key} = {value}" for key, value in values.items())
        super().__init__(f"Not finite{where}: {what}. {advice}".rstrip())


def check_finite(values: Mapping[str, Tensor], processes: dist.ProcessGroup | None = None) -> None:
    """NonFiniteLossError naming those of some scalars that are not finite. One transfer from the device.

    processes: all raise where one has such a value, or the others would wait for it; None: this alone.
    """
    if not values:
        return
    stacked = torch.stack([value.detach().double() for value in values.values()])
    found = (~stacked.isfinite()).any().float()
    if processes is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=processes)
    if not found:
        return
    bad = {key: value for key, value in zip(values, stacked.tolist()) if not math.isfinite(value)}
    if processes is not None:
        owners = zip(dist.get_process_group_ranks(processes), gather_objects(bad, processes))
        bad = {
            f"{key} of process {rank}" if rank else key: value
            for rank, entries in owners
            for key, value in entries.items()
        }
    raise NonFiniteLossError(bad, processes)
