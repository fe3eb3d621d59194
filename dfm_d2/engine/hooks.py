"""Hooks of our own: evaluation, the best checkpoint, one state of all processes, and progress."""

import collections
import datetime
import json
import logging
import re
import statistics
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import tqdm
from torch import nn

from dfm_d2.data.files import write_text_atomically
from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.framework import EvalHook, HookBase, inference_on_dataset
from dfm_d2.local_update import BlockOptimizer, predictor_index
from dfm_d2.local_update.processes import mean_over_processes

_logger = logging.getLogger(__name__)

BEST = "model_best"


class FinalEvalHook(EvalHook):
    """Detectron2's hook, which after the last iteration evaluates even where that iteration failed: there one
    process would wait for others that are still at work on it."""

    def after_train(self) -> None:
        if not self.trainer.failed:
            super().after_train()


class BestCheckpointHook(HookBase):
    """Saves ``model_best.pth`` whenever an evaluation sets a new best of ``metric`` (greater is better).

    To be placed after the evaluation hook. What is best so far lives in ``model_best.json`` beside it and not
    in the other checkpoints: these may be older than the best one, which a worse one must not replace.
    """

    def __init__(self, checkpointer: SafeCheckpointer, metric: str):
        """``metric``: a flat name, such as ``bbox/AP50``."""
        self.checkpointer = checkpointer
        self.metric = metric
        self.record = Path(checkpointer.save_dir) / f"{BEST}.json"
        self.best = float("-inf")

    def before_train(self) -> None:
        """Read the best so far of the run that is resumed; a fresh run starts with none."""
        if self.trainer.start_iter == 0:
            self.record.unlink(missing_ok=True)
        elif self.record.is_file():
            record = json.loads(self.record.read_text(encoding="utf-8"))
            if record["metric"] == self.metric:
                self.best = record["value"]

    def after_step(self) -> None:
        """Look at the evaluation of this iteration, if there was one."""
        storage, iteration = self.trainer.storage, min(self.trainer.iter, self.trainer.max_iter - 1)
        measured = {name: value for name, (value, at) in storage.latest().items() if at == storage.iter}
        value = measured.get(self.metric)
        if value is None:
            scores = sorted(name for name in measured if name.startswith(("bbox", "accuracy")))
            if scores:
                said = "TEST.BEST_METRIC %s is not among what is measured: %s"
                _logger.warning(said, self.metric, ", ".join(scores))
        elif value > self.best:
            self.best = value
            self.checkpointer.save(BEST, tag=False, iteration=iteration)
            record = {"metric": self.metric, "value": value, "iteration": iteration}
            write_text_atomically(self.record, json.dumps(record) + "\n")
            _logger.info("Best %s so far: %.2f at iteration %d", self.metric, value, iteration)

    def after_train(self) -> None:
        if not self.trainer.failed:
            self.after_step()


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
            self._average_statistics()
            if self.trainer.optimizer.grid.members > 1:
                self._gather_predictors(self.trainer.optimizer)

    def _average_statistics(self) -> None:
        """Of batch norms: each process has seen its own images; what is evaluated must be what is saved."""
        for module in self.trainer.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                for statistic in (module.running_mean, module.running_var):
                    statistic.copy_(mean_over_processes(statistic))

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


class ProgressBar(HookBase):
    """Loss of each block, total, learning rate, seconds an iteration and time left.

    On a terminal a bar, elsewhere a line of the log every ``period`` iterations. Values are medians over
    the last ``period`` iterations.
    """

    def __init__(self, period: int = 20, use_bar: bool | None = None):
        """``use_bar``: None asks whether stderr is a terminal."""
        self.period = period
        self.use_bar = sys.stderr.isatty() if use_bar is None else use_bar
        self._durations: collections.deque[float] = collections.deque(maxlen=period)
        self._bar = tqdm.tqdm(disable=True)  # until training starts

    def before_train(self) -> None:
        self._last = time.perf_counter()
        self._bar = tqdm.tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            unit="it",
            dynamic_ncols=True,
            disable=not self.use_bar,
        )

    def after_step(self) -> None:
        now, done, end = time.perf_counter(), self.trainer.iter + 1, self.trainer.max_iter
        self._durations.append(now - self._last)
        self._last = now
        if self.use_bar:
            self._bar.update()
            self._bar.set_postfix_str(self.describe(), refresh=False)
        elif done % self.period == 0 or done == end:
            seconds = statistics.median(self._durations)
            left = datetime.timedelta(seconds=round(seconds * (end - done)))
            _logger.info("%d/%d  %s  %.3f s/it  ETA %s", done, end, self.describe(), seconds, left)

    def after_train(self) -> None:
        self._bar.close()

    def describe(self) -> str:
        """Such as ``total 9.12  predictor0 2.31  predictor1 2.28  lr 2.5e-04``."""
        storage = self.trainer.storage
        values = {name: value for name, (value, _) in storage.latest_with_smoothing_hint(self.period).items()}
        parts = [f"total {values['total_loss']:.3f}"] if "total_loss" in values else []
        parts += [f"{block} {loss:.3f}" for block, loss in loss_by_block(values).items()]
        if "lr" in values:
            parts.append(f"lr {values['lr']:.1e}")
        return "  ".join(parts)


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


@contextmanager
def evaluation_bar(
    loader: Collection[list[dict]], title: str, use_bar: bool | None = None
) -> Iterator[Collection[list[dict]]]:
    """Within it, what to give ``inference_on_dataset``: the batches, with a bar on a terminal.

    Elsewhere the loader itself: ``inference_on_dataset`` logs a line with the time left every few seconds,
    on both providers; these lines are held back while there is a bar.

    use_bar: None asks whether stderr is a terminal.
    """
    if not (sys.stderr.isatty() if use_bar is None else use_bar):
        yield loader
        return
    lines = logging.getLogger(inference_on_dataset.__module__)
    level = lines.level
    lines.setLevel(logging.WARNING)
    try:
        with tqdm.tqdm(loader, desc=title, unit="batch", dynamic_ncols=True, leave=False) as bar:
            yield bar
    finally:
        lines.setLevel(level)
