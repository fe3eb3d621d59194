"""Hooks that bring several processes to one state before an evaluation or a checkpoint looks at it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from dfm_d2.engine.ema import ModelEMA
from dfm_d2.framework import HookBase
from dfm_d2.local_update import BlockOptimizer, ProcessGrid, predictor_index
from dfm_d2.local_update.processes import mean_over_processes


class Gathering(HookBase):
    """Brings the processes to one state before an evaluation or a checkpoint looks at it."""

    def __init__(self, periods: Sequence[int]):
        """``periods``: of those, in iterations; 0: never. After the last iteration in any case."""
        self.periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        """Gather if it is time to."""
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            self.gather()

    def gather(self) -> None:
        """All processes call this at the same time."""
        raise NotImplementedError


class MeanStatistics(Gathering):
    """Gives every process the mean of the running statistics of batch norms: each process has seen its own
    images, and what is evaluated must be what is saved."""

    def __init__(self, periods: Sequence[int], ema: ModelEMA | None = None):
        """``ema``: averaged weights, whose statistics are treated alike."""
        super().__init__(periods)
        self.ema = ema

    @torch.no_grad()
    def gather(self) -> None:
        """Average in place."""
        for name, module in self.trainer.model.named_modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
                continue
            for key in ("running_mean", "running_var"):
                statistics = [getattr(module, key)]
                if self.ema is not None:
                    statistics.append(self.ema.weights[f"{name}.{key}"])
                for tensor in statistics:
                    tensor.copy_(mean_over_processes(tensor))


class GatherBlocks(Gathering):
    """Brings the predictors of others up to date before an evaluation or a checkpoint looks at them all."""

    def __init__(
        self, grid: ProcessGrid, optimizer: BlockOptimizer, periods: tuple[int, ...], ema: ModelEMA | None
    ):
        """``periods``: see Gathering."""
        super().__init__(periods)
        self.grid = grid
        self.optimizer = optimizer
        self.ema = ema

    @torch.no_grad()
    def gather(self) -> None:
        """Parameters (and averages) go to all of the row, the optimizer's state to the first process."""
        grid, state = self.grid, self.optimizer.state_by_name()
        owned: dict[str, dict] = {}
        for block, named in self.trainer.model.blocks().items():
            index = predictor_index(block)
            if index is None:
                continue
            owner = grid.owner(index)
            for name, parameter in named:
                averages = [] if self.ema is None else [self.ema.weights[name]]
                for tensor in (parameter.data, *averages):
                    dist.broadcast(tensor, grid.first + owner, group=grid.row)
                if owner == grid.member and name in state:
                    owned[name] = {
                        key: value.cpu() if torch.is_tensor(value) else value
                        for key, value in state[name].items()
                    }
        if grid.first != 0:  # the first process writes, of the first row
            return
        received: list[dict] | None = [{}] * grid.members if grid.member == 0 else None
        dist.gather_object(owned, received, grid.first, group=grid.host)
        self.optimizer.elsewhere = {name: entry for part in received or [] for name, entry in part.items()}
