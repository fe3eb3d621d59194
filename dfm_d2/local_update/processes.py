"""The processes of one run, where there are several: what they exchange, and who owns which block.

No DistributedDataParallel: its reducer is armed once for each forward, and here each block has a backward of
its own. W processes with B / W images each compute what one process computes with B, to rounding.
"""

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dfm_d2.local_update.blocks import SHARED_BLOCK, predictor_index

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


@dataclass(frozen=True)
class ProcessGrid:
    """The place of this process.

    members: G. member: the place in its row. first: the process that begins the row.
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
    def build(cls, members: int, num_predictors: int) -> "ProcessGrid":
        """The grid of all processes; each of them calls this at the same time.

        Raises ValueError for a number of members that the processes or the predictors do not allow.
        """
        if members == 1:
            return cls()
        key, world = f"MODEL.DFM.PREDICTOR_RANKS is {members}", total_processes()
        if world % members:
            raise ValueError(f"{key}: it must divide the number of processes, {world} (--num-gpus).")
        if members > num_predictors:
            raise ValueError(f"{key}, but MODEL.DFM.NUM_PREDICTORS {num_predictors}: give each rank one.")
        rank = dist.get_rank()
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

    def averaging(self, block: str) -> tuple[dist.ProcessGroup | None, int]:
        """The processes over which the gradient of a block is added up (None: all), and by what to divide.

        The shared block's gradient of a process holds the losses of all predictors of its row, each of them
        averaged over W / G owners. A stage of the backbone is plainly data parallel.
        """
        owners = total_processes() // self.members
        if predictor_index(block) is not None:
            return self.replicas, owners
        return None, owners if block == SHARED_BLOCK else total_processes()


class GradientReducer:
    """Averages the gradients of a block over the processes, while the next block computes."""

    def __init__(self, grid: ProcessGrid) -> None:
        self.grid = grid
        self._running: dict[str, tuple[dist.Work, Tensor]] = {}

    def start(self, block: str, parameters: Sequence[nn.Parameter]) -> None:
        """Begin to add up the gradients of a block; its processes all do so in the same order of blocks."""
        group, owners = self.grid.averaging(block)
        alone = owners == 1 if group is not None else total_processes() == 1
        if alone or block in self._running or not parameters:
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
        buffer /= self.grid.averaging(block)[1]
        grads = [parameter.grad for parameter in parameters]
        means = _unflatten_dense_tensors(buffer[: -len(parameters)], grads)
        for parameter, flag, mean in zip(parameters, flags, means):
            # A zero in place of None would begin to decay the weights of what has no part in the loss.
            parameter.grad = parameter.grad.copy_(mean) if flag else None


def is_true_anywhere(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in any process."""
    if world_size() == 1:
        return flag
    count = torch.tensor(float(flag), device=device)
    dist.all_reduce(count, group=current_group())
    return bool(count > 0)


def of_all_processes(values: dict[str, float]) -> dict[str, float]:
    """The entries of every process; the keys of a process but the first say whose they are."""
    if world_size() == 1:
        return values
    gathered: list[dict[str, float]] = [{}] * world_size()
    dist.all_gather_object(gathered, values, group=current_group())
    return {
        f"{key} of process {rank}" if rank else key: value
        for rank, found in zip(_ranks(), gathered)
        for key, value in found.items()
    }


def gathered(values: list, group: dist.ProcessGroup | None) -> list:
    """The values of all processes of a group, once each, in their order; None: of this one."""
    if group is None:
        return values
    lists: list[list] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(lists, values, group=group)
    return list(dict.fromkeys(value for found in lists for value in found))


def current_processes() -> dist.ProcessGroup | None:
    """The processes of `among`, or all; None where there is only one."""
    return None if world_size() == 1 else current_group() or dist.group.WORLD


def _ranks() -> list[int]:
    """The processes of the current group."""
    group = current_group()
    return list(range(world_size())) if group is None else dist.get_process_group_ranks(group)


@torch.no_grad()
def broadcast_model(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if world_size() == 1:
        return
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
