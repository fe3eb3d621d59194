"""Who we are among the processes of a run, and exchange of small objects among them.

Everything also works, trivially, where torch.distributed is not initialised.
"""

import functools

import torch
import torch.distributed as dist


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def synchronize() -> None:
    """Wait for all processes."""
    if get_world_size() > 1:
        on_gpu = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)


@functools.lru_cache
def _cpu_group():
    """A group of all processes that exchanges objects through main memory."""
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD


def all_gather(data) -> list:
    """The `data` (anything that can be pickled) of each process, in the order of ranks, on every process."""
    gathered = [data] * get_world_size()
    if len(gathered) > 1:
        dist.all_gather_object(gathered, data, group=_cpu_group())
    return gathered


def gather(data, dst: int = 0) -> list:
    """As `all_gather`, on the process `dst` only; an empty list on the others."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * get_world_size() if get_rank() == dst else None
    dist.gather_object(data, gathered, dst=dst, group=_cpu_group())
    return gathered or []
