"""Hooks of our own: progress, the averaged weights, and the best checkpoint."""

import collections
import datetime
import json
import logging
import re
import statistics
import sys
import time
from pathlib import Path

import tqdm

from dfm_d2.data.files import write_text_atomically
from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.engine.ema import ModelEMA
from dfm_d2.framework import EvalHook, HookBase
from dfm_d2.local_update import predictor_index

_logger = logging.getLogger(__name__)

BEST = "model_best"


class EMAHook(HookBase):
    """Takes the weights of every iteration into the average."""

    def __init__(self, ema: ModelEMA):
        self.ema = ema

    def after_step(self) -> None:
        """Update the average."""
        self.ema.update()


class FinalEvalHook(EvalHook):
    """Detectron2's hook, which after the last iteration evaluates even where that iteration failed: there one
    process would wait for others that are still at work on it."""

    def after_train(self) -> None:
        """Evaluate, unless training failed."""
        if not self.trainer.failed:
            super().after_train()


class BestCheckpointHook(HookBase):
    """Saves ``model_best.pth`` whenever an evaluation sets a new best of ``metric`` (greater is better).

    To be placed after the evaluation hook. What is best so far lives in ``model_best.json`` beside it and not
    in the other checkpoints: these may be older than the best one, which a worse one must not replace.
    """

    def __init__(self, checkpointer: SafeCheckpointer, metric: str):
        """``metric``: a flat name, such as ``bbox/AP50`` or ``bbox_ema/AP50``."""
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
        self._look()

    def after_train(self) -> None:
        """Look at the last evaluation, unless training failed."""
        if not self.trainer.failed:
            self._look()

    def _look(self) -> None:
        storage = self.trainer.storage
        latest = storage.latest()
        measured = sorted(name for name in latest if name.startswith(("bbox", "accuracy")))
        if self.metric not in latest and measured:
            names = ", ".join(measured)
            _logger.warning("TEST.BEST_METRIC %s is not among what is measured: %s", self.metric, names)
        value, iteration = latest.get(self.metric, (float("-inf"), -1))
        if iteration != storage.iter or value <= self.best:
            return
        self.best = value
        self.checkpointer.save(BEST, tag=False, iteration=min(iteration, self.trainer.max_iter - 1))
        record = {"metric": self.metric, "value": value, "iteration": iteration}
        write_text_atomically(self.record, json.dumps(record) + "\n")
        _logger.info("Best %s so far: %.2f at iteration %d", self.metric, value, iteration)


class ProgressBar(HookBase):
    """Loss of each block, total, learning rate, seconds an iteration and time left.

    On a terminal a bar, elsewhere a line of the log every ``period`` iterations. Values are medians over
    the last ``period`` iterations.
    """

    def __init__(self, period: int = 20, use_bar: bool | None = None):
        """``use_bar``: None asks whether stderr is a terminal."""
        self.period = period
        self.use_bar = sys.stderr.isatty() if use_bar is None else use_bar
        self._bar: tqdm.tqdm | None = None
        self._durations: collections.deque[float] = collections.deque(maxlen=period)
        self._last = 0.0

    def before_train(self) -> None:
        """Start the clock and, on a terminal, the bar."""
        self._last = time.perf_counter()
        if self.use_bar:
            self._bar = tqdm.tqdm(
                total=self.trainer.max_iter, initial=self.trainer.start_iter, unit="it", dynamic_ncols=True
            )

    def after_step(self) -> None:
        """Show where training is."""
        now = time.perf_counter()
        self._durations.append(now - self._last)
        self._last = now
        done = self.trainer.iter + 1
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix_str(self.describe(), refresh=False)
        elif done % self.period == 0 or done == self.trainer.max_iter:
            seconds = statistics.median(self._durations)
            left = datetime.timedelta(seconds=round(seconds * (self.trainer.max_iter - done)))
            _logger.info(
                "%d/%d  %s  %.3f s/it  ETA %s", done, self.trainer.max_iter, self.describe(), seconds, left
            )

    def after_train(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

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

    def order(block: str) -> tuple:  # predictor2 before predictor10, stages of the backbone after them
        index = predictor_index(block)
        return (1, 0, block) if index is None else (0, index, "")

    return {block: totals[block] for block in sorted(totals, key=order)}
