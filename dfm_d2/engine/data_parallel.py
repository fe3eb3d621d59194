"""What processes exchange in a training step: gradients block by block, a count, a flag, the metrics.

No DistributedDataParallel: its reducer is armed once for each forward, and here each block has a backward of
its own. W processes with B / W images each compute what one process computes with B, to rounding.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dfm_d2.core.processes import world_size


class GradientReducer:
    """Averages the gradients of a block over the processes, while the next block computes."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[dist.Work, Tensor]] = {}

    def start(self, block: str, parameters: Sequence[nn.Parameter]) -> None:
        """Begin to add up the gradients of a block; all processes do so in the same order of blocks."""
        if world_size() == 1 or block in self._running or not parameters:
            return
        for parameter in parameters:
            if parameter.grad is None:  # another process may have one
                parameter.grad = torch.zeros_like(parameter)
        buffer = _flatten_dense_tensors([parameter.grad for parameter in parameters])
        self._running[block] = (dist.all_reduce(buffer, async_op=True), buffer)

    def finish(self, block: str, parameters: Sequence[nn.Parameter]) -> None:
        """Wait for the sum, and put the mean in the place of the gradients."""
        if block not in self._running:
            return
        work, buffer = self._running.pop(block)
        work.wait()
        buffer /= world_size()
        grads = [parameter.grad for parameter in parameters]
        for grad, mean in zip(grads, _unflatten_dense_tensors(buffer, grads)):
            grad.copy_(mean)


def is_true_anywhere(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in any process."""
    if world_size() == 1:
        return flag
    count = torch.tensor(float(flag), device=device)
    dist.all_reduce(count)
    return bool(count > 0)


def of_all_processes(values: dict[str, float]) -> dict[str, float]:
    """The entries of every process; the keys of a process but the first say whose they are."""
    if world_size() == 1:
        return values
    gathered: list[dict[str, float]] = [{}] * world_size()
    dist.all_gather_object(gathered, values)
    return {
        f"{key} of process {rank}" if rank else key: value
        for rank, found in enumerate(gathered)
        for key, value in found.items()
    }


@torch.no_grad()
def broadcast_model(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if world_size() == 1:
        return
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
