"""Hooks: timing, learning rate, writing of metrics, evaluation."""

import datetime
import logging
import time
from collections import Counter
from collections.abc import Callable

import torch

from dfm_d2.framework._builtin import comm
from dfm_d2.framework._builtin.events import EventWriter
from dfm_d2.framework._builtin.loops import HookBase

logger = logging.getLogger(__name__)


class IterationTimer(HookBase):
    """Put the seconds of each step into the storage as "time", and log a summary after training.

    Comes first among the hooks: it measures from its own `before_step` to its own `after_step`.
    """

    def __init__(self, warmup_iter: int = 3):
        """The first `warmup_iter` steps are not counted."""
        self._warmup_iter = warmup_iter
        self._count, self._in_steps = 0, 0.0

    def before_train(self) -> None:
        self._train_start = time.perf_counter()

    def before_step(self) -> None:
        self._step_start = time.perf_counter()

    def after_step(self) -> None:
        seconds = time.perf_counter() - self._step_start
        if self.trainer.storage.iter - self.trainer.start_iter + 1 >= self._warmup_iter:
            self.trainer.storage.put_scalars(time=seconds)
            self._count += 1
            self._in_steps += seconds

    def after_train(self) -> None:
        total = datetime.timedelta(seconds=int(time.perf_counter() - self._train_start))
        logger.info("Training took %s, %.4f s an iteration", total, self._in_steps / max(self._count, 1))


class PeriodicWriter(HookBase):
    """Call each writer's `write` every `period` iterations and at the end, where they are closed too."""

    def __init__(self, writers: list[EventWriter], period: int = 20):
        self._writers = writers
        self._period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            # Once more: other hooks may have put something after the last step.
            writer.write()
            writer.close()


class LRScheduler(HookBase):
    """Step the trainer's `scheduler` after each iteration, and put its `optimizer`'s rate into the storage as
    "lr"."""

    def before_train(self) -> None:
        self._group = self.get_best_param_group_id(self.trainer.optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """Index of the group whose rate is shown: the one of most parameters; where all have one, of the
        commonest rate."""
        groups = optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        rate = self.trainer.optimizer.param_groups[self._group]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.trainer.scheduler.step()

    def state_dict(self) -> dict:
        return self.trainer.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.trainer.scheduler.load_state_dict(state_dict)


class EvalHook(HookBase):
    """Evaluate every `eval_period` iterations (0: never) and after a training that was not broken off."""

    def __init__(self, eval_period: int, eval_function: Callable[[], dict | None]):
        """`eval_function` returns numbers by name, which go into the storage, or nothing."""
        self._period = eval_period
        self._function = eval_function

    def _evaluate(self) -> None:
        results = self._function()
        if results:
            self.trainer.storage.put_scalars(**results, smoothing_hint=False)
        # Processes may need different times for it.
        comm.synchronize()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # The evaluation after the last iteration is after_train's.
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._evaluate()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._evaluate()
        # It may hold the trainer.
        del self._function
