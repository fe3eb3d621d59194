"""The processes of one run: what they exchange, the error that all raise, and who owns which block.

No DistributedDataParallel: its reducer is armed once for each forward, and here each block has a backward of
its own. W processes with B / W images each compute what one process computes with B, to rounding.
"""

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dfm_d2.local_update.blocks import predictor_index

# A process that waits this long for the others gives up. Those that wait while the main process computes the
# AP of a large data set must not; one that died is noticed at once, by its connection.
TIMEOUT = datetime.timedelta(minutes=60)

# The group of the innermost `among`; None: all processes.
_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)


@contextmanager
def among(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within it the current processes are those of `group`; None: all of them."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def all_processes() -> dist.ProcessGroup | None:
    """The group of all processes, within `among` too; None where there is only one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def current_processes() -> dist.ProcessGroup | None:
    """The processes that a computation speaks of: those of the innermost `among`, or all."""
    return _group.get() or all_processes()


def size_of(group: dist.ProcessGroup | None) -> int:
    """The number of processes of a group; of None, which is one process alone, 1."""
    return 1 if group is None else dist.get_world_size(group)


def world_size() -> int:
    """W, the number of the current processes."""
    return size_of(current_processes())


def max_over_processes(values: Tensor) -> Tensor:
    """The greatest of each element over the current processes, on each of them."""
    return _all_reduced(values, dist.ReduceOp.MAX)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over the current processes, on each of them, without gradients."""
    return _all_reduced(values, dist.ReduceOp.SUM) / world_size()


def _all_reduced(values: Tensor, operation: dist.ReduceOp) -> Tensor:
    values, group = values.detach(), current_processes()
    if group is not None:
        values = values.clone()
        dist.all_reduce(values, operation, group=group)
    return values


def gather_objects(value: Any, group: dist.ProcessGroup | None) -> list:
    """The value of each process of a group, in their order, on each of them; None: of this one."""
    found = [value] * size_of(group)
    if group is not None:
        dist.all_gather_object(found, value, group=group)
    return found


class NonFiniteLossError(FloatingPointError):
    """A loss, or the gradient or the parameters of a block, are infinite or not a number.

    Raised before any parameter of the iteration is stepped, or where blocks are stepped one by one before the
    offending block is stepped: the blocks before it have been, in memory only. For parameters after it.
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


def mean_of_metrics(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers: of each name the mean over the processes that have it. One transfer."""
    values = torch.stack([value.detach().double() for value in metrics.values()]).tolist()
    found: dict[str, list[float]] = {}
    for entries in gather_objects(dict(zip(metrics, values)), all_processes()):
        for key, value in entries.items():
            found.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


@torch.no_grad()
def broadcast_model(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    for tensor in model.state_dict().values() if world_size() > 1 else ():
        dist.broadcast(tensor, 0)


@dataclass(frozen=True)
class ProcessGrid:
    """Who owns which block: the processes stand in rows of G members, which share out the predictors.

    members: G. member: the place of this process in its row. first: the process that begins the row.
    row, replicas: the groups of a row, and of the owners of the same predictors; None: this process alone.
    host: the row again, for objects of the host.
    """

    members: int = 1
    member: int = 0
    first: int = 0
    row: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    host: dist.ProcessGroup | None = None

    @classmethod
    def build(cls, members: int) -> "ProcessGrid":
        """The grid of all processes, whose number ``members`` divides; each calls this at the same time."""
        if members == 1:
            return cls()
        rank, world = dist.get_rank(), world_size()
        rows = [list(range(first, first + members)) for first in range(0, world, members)]
        columns = [list(range(member, world, members)) for member in range(members)]
        row, _ = dist.new_subgroups_by_enumeration(rows, timeout=TIMEOUT)
        replicas, _ = dist.new_subgroups_by_enumeration(columns, timeout=TIMEOUT)
        host, _ = dist.new_subgroups_by_enumeration(rows, timeout=TIMEOUT, backend="gloo")
        return cls(members, rank % members, rank - rank % members, row, replicas, host)

    def owner(self, index: int) -> int:
        """The member that owns predictor ``index``: in turns, so that a chain of them is a pipeline."""
        return index % self.members

    def owns(self, block: str) -> bool:
        """Whether this process updates a block: its own predictors, and all that is no predictor."""
        index = predictor_index(block)
        return index is None or self.owner(index) == self.member

    def averaging(self, block: str) -> dist.ProcessGroup | None:
        """The processes over which the gradient of a block is averaged."""
        shared_out = self.members > 1 and predictor_index(block) is not None
        return self.replicas if shared_out else all_processes()


class GradientReducer:
    """Averages the gradients of a block over the processes, while the next block computes."""

    def __init__(self, grid: ProcessGrid) -> None:
        self.grid = grid
        self._running: dict[str, tuple[dist.Work, Tensor]] = {}

    def start(self, block: str, parameters: Sequence[nn.Parameter]) -> None:
        """Begin to add up the gradients of a block; its processes all do so in the same order of blocks."""
        group = self.grid.averaging(block)
        if size_of(group) == 1 or block in self._running or not parameters:
            return
        has = [parameter.grad is not None for parameter in parameters]
        for parameter in parameters:
            if parameter.grad is None:  # another process may have one
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters]
        buffer = _flatten_dense_tensors([*grads, grads[0].new_tensor(has)])
        self._running[block] = (dist.all_reduce(buffer, group=group, async_op=True), buffer)

    def finish(self, block: str, parameters: Sequence[nn.Parameter]) -> None:
        """Wait for the sum, and put the mean in the place of the gradients; None where no process has one."""
        if block not in self._running:
            return
        work, buffer = self._running.pop(block)
        work.wait()
        flags = buffer[-len(parameters) :].tolist()
        buffer /= size_of(self.grid.averaging(block))
        grads = [parameter.grad for parameter in parameters]
        means = _unflatten_dense_tensors(buffer[: -len(parameters)], grads)
        for parameter, flag, mean in zip(parameters, flags, means):
            # A zero in place of None would begin to decay the weights of what has no part in the loss.
            parameter.grad = parameter.grad.copy_(mean) if flag else None
