"""What processes exchange in a training step: gradients block by block, a count, a flag, the metrics.

No DistributedDataParallel: its reducer is armed once for each forward, and here each block has a backward of
its own. W processes with B / W images each compute what one process computes with B, to rounding.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dfm_d2.local_update.process_grid import ProcessGrid
from dfm_d2.local_update.processes import current_group, total_processes, world_size


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
