"""Hooks of our own: the last evaluation, one state of all processes, and progress."""

import collections
import datetime
import logging
import re
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from dfm_d2.framework import EvalHook, HookBase, TrainerBase
from dfm_d2.local_update import predictor_index
from dfm_d2.local_update.processes import mean_over_processes, world_size

_logger = logging.getLogger(__name__)


class FinalEvalHook(EvalHook):
    """Detectron2's hook, which after the last iteration evaluates even where that iteration failed: there one
    process would wait for others that are still at work on it."""

    def after_train(self) -> None:
        if not self.trainer.failed:
            super().after_train()


class CalibrationHook(HookBase):
    """Calls a function after the last iteration, before that is saved; the processes are in one state."""

    def __init__(self, calibrate: Callable[[], None]):
        self._calibrate = calibrate

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.trainer.max_iter:
            gather_state(self.trainer)
            self._calibrate()


@torch.no_grad()
def gather_state(trainer: TrainerBase) -> None:
    """Bring the processes, which all call this, to one state before something looks at it."""
    for module in trainer.model.modules() if world_size() > 1 else ():
        # Each process has seen its own images.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for statistic in (module.running_mean, module.running_var):
                statistic.copy_(mean_over_processes(statistic))
    # Parameters of predictors go to all of the row, the state of their optimizers to the first process.
    grid, state, owned = trainer.optimizer.grid, trainer.optimizer.state_by_name(), {}
    for block, named in trainer.model.blocks().items() if grid.members > 1 else ():
        if predictor_index(block) is None:
            continue
        owner = grid.owner(predictor_index(block))
        for name, parameter in named:
            dist.broadcast(parameter.data, grid.first + owner, group=grid.row)
            if owner == grid.member and name in state:
                owned[name] = {k: x.cpu() if torch.is_tensor(x) else x for k, x in state[name].items()}
    if grid.members > 1 and grid.first == 0:  # the first process writes, of the first row
        received: list[dict] | None = [{}] * grid.members if grid.member == 0 else None
        dist.gather_object(owned, received, grid.first, group=grid.host)
        trainer.optimizer.elsewhere = {k: entry for part in received or [] for k, entry in part.items()}


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
