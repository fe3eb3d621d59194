"""Who computes what among W processes: rows of G that share out the predictors of the same images.

G is `MODEL.DFM.PREDICTOR_RANKS`. Processes g G, ..., g G + G - 1 are row g: they load different images, and
each evaluates its own predictors on the images of all of them. The W / G processes at one place of their rows
own the same predictors: these are data parallel.
"""

from dataclasses import dataclass

import torch.distributed as dist

from dfm_d2.local_update.blocks import SHARED_BLOCK, predictor_index
from dfm_d2.local_update.processes import TIMEOUT, total_processes


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
