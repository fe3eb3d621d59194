"""The processes of one run, where there are several."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist
from torch import Tensor

# A process that waits this long for the others gives up. Those that wait while the main process computes the
# AP of a large data set must not; one that died is noticed at once, by its connection.
TIMEOUT = datetime.timedelta(minutes=60)

# The group that the functions below mean; None: all processes.
_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)


@contextmanager
def among(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within it the functions of this file speak of the processes of `group` alone."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def current_group() -> dist.ProcessGroup | None:
    """The group of the innermost `among`; None: all processes."""
    return _group.get()


def world_size() -> int:
    """W, the number of processes."""
    return dist.get_world_size(_group.get()) if total_processes() > 1 else 1


def total_processes() -> int:
    """The number of all processes, within `among` too."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def max_over_processes(values: Tensor) -> Tensor:
    """The greatest of each element over all processes, on each of them."""
    if world_size() == 1:
        return values
    greatest = values.clone()
    dist.all_reduce(greatest, dist.ReduceOp.MAX, group=_group.get())
    return greatest


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, on each of them, without gradients."""
    if world_size() == 1:
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total, group=_group.get())
    return total / world_size()
