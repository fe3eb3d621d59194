"""Hooks of our own: the last evaluation, one state of all processes, and progress."""

import collections
import datetime
import logging
import re
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from dfm_d2.framework import EvalHook, HookBase
from dfm_d2.local_update import BlockOptimizer, predictor_index
from dfm_d2.local_update.processes import mean_over_processes

_logger = logging.getLogger(__name__)


class FinalEvalHook(EvalHook):
    """Detectron2's hook, which after the last iteration evaluates even where that iteration failed: there one
    process would wait for others that are still at work on it."""

    def after_train(self) -> None:
        if not self.trainer.failed:
            super().after_train()


class CalibrationHook(HookBase):
    """Calls a function after the last iteration, before that is saved."""

    def __init__(self, calibrate: Callable[[], None]):
        self._calibrate = calibrate

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.trainer.max_iter:
            self._calibrate()


class GatherHook(HookBase):
    """Brings the processes to one state before an evaluation or a checkpoint looks at it."""

    def __init__(self, periods: Sequence[int]):
        """``periods``: of those, in iterations; 0: never. After the last iteration in any case."""
        self.periods = [period for period in periods if period > 0]

    @torch.no_grad()
    def after_step(self) -> None:
        """Gather if it is time to: all processes at the same time."""
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            for module in self.trainer.model.modules():
                # Each process has seen its own images; what is evaluated must be what is saved.
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                    for statistic in (module.running_mean, module.running_var):
                        statistic.copy_(mean_over_processes(statistic))
            if self.trainer.optimizer.grid.members > 1:
                self._gather_predictors(self.trainer.optimizer)

    def _gather_predictors(self, optimizer: BlockOptimizer) -> None:
        """Parameters go to all of the row, the state of their optimizers to the first process."""
        grid, state, owned = optimizer.grid, optimizer.state_by_name(), {}
        for block, named in self.trainer.model.blocks().items():
            if predictor_index(block) is None:
                continue
            owner = grid.owner(predictor_index(block))
            for name, parameter in named:
                dist.broadcast(parameter.data, grid.first + owner, group=grid.row)
                if owner == grid.member and name in state:
                    owned[name] = {k: x.cpu() if torch.is_tensor(x) else x for k, x in state[name].items()}
        if grid.first != 0:  # the first process writes, of the first row
            return
        received: list[dict] | None = [{}] * grid.members if grid.member == 0 else None
        dist.gather_object(owned, received, grid.first, group=grid.host)
        optimizer.elsewhere = {name: entry for part in received or [] for name, entry in part.items()}


class Progress(HookBase):
    """Losses, learning rate, seconds an iteration and time left: a bar on a terminal, and in any case a line
    of the log every ``period`` iterations.

    Values are medians over the last ``period`` iterations, such as
    ``40/800  total 9.12  predictor0 2.31  predictor1 2.28  lr 2.5e-04  0.452 s/it  ETA 0:05:44``.
    """

    def __init__(self, period: int = 20):
        self.period = period
        self._durations: collections.deque[float] = collections.deque(maxlen=period)
        self._bar = tqdm(disable=True)  # until training starts

    def before_train(self) -> None:
        self._last = time.perf_counter()
        begin, end = self.trainer.start_iter, self.trainer.max_iter
        self._bar = tqdm(total=end, initial=begin, unit="it", dynamic_ncols=True, disable=None)

    def after_step(self) -> None:
        now, done, end = time.perf_counter(), self.trainer.iter + 1, self.trainer.max_iter
        self._durations.append(now - self._last)
        self._last = now
        self._bar.update()
        if done % self.period and done != end:
            return
        latest = self.trainer.storage.latest_with_smoothing_hint(self.period)
        values = {name: value for name, (value, _) in latest.items()}
        parts = [f"total {values['total_loss']:.3f}"] if "total_loss" in values else []
        parts += [f"{block} {loss:.3f}" for block, loss in loss_by_block(values).items()]
        parts += [f"lr {values['lr']:.1e}"] if "lr" in values else []
        seconds = statistics.median(self._durations)
        left = datetime.timedelta(seconds=round(seconds * (end - done)))
        _logger.info("%d/%d  %s  %.3f s/it  ETA %s", done, end, "  ".join(parts), seconds, left)
        self._bar.set_postfix_str(parts[0] if parts else "")

    def after_train(self) -> None:
        self._bar.close()


def loss_by_block(metrics: dict[str, float]) -> dict[str, float]:
    """Sum of the losses of each block: ``{"loss_cls/predictor0": 1, "loss_l1/predictor0": 2}`` is
    ``{"predictor0": 3}``."""
    totals: dict[str, float] = {}
    for key, value in metrics.items():
        match = re.fullmatch(r"loss.*/(\w+)", key)
        if match:
            totals[match[1]] = totals.get(match[1], 0.0) + value

    def numbers(block: str) -> list:  # predictor2 before predictor10
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", block)]

    return {block: totals[block] for block in sorted(totals, key=numbers)}
