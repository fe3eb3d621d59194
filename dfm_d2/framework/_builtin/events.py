"""Scalars of a training: where they are put, and who writes them to files."""

import json
import os
from collections import defaultdict
from functools import cached_property

from fvcore.common.history_buffer import HistoryBuffer

from dfm_d2.framework._builtin.utils import PathManager

_STORAGES: list["EventStorage"] = []


def get_event_storage() -> "EventStorage":
    """The innermost `with EventStorage(...)`; raises AssertionError outside of any."""
    assert _STORAGES, "get_event_storage() is only possible inside `with EventStorage(...)`"
    return _STORAGES[-1]


class EventStorage:
    """The history of each scalar, by name, with the iteration at which each value was put.

    `iter` is the current iteration, which the trainer sets.
    """

    def __init__(self, start_iter: int = 0):
        self.iter = start_iter
        self._history: dict[str, HistoryBuffer] = {}
        self._smoothing_hints: dict[str, bool] = {}

    def put_scalar(
        self, name: str, value: float, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Add a value. The first `smoothing_hint` of a name tells writers to show the median of the last."""
        self._smoothing_hints.setdefault(name, smoothing_hint)
        iteration = self.iter if cur_iter is None else cur_iter
        self._history.setdefault(name, HistoryBuffer()).update(float(value), iteration)

    def put_scalars(self, *, smoothing_hint: bool = True, **kwargs: float) -> None:
        """Add several values."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint)

    def history(self, name: str) -> HistoryBuffer:
        """All values of a scalar; raises KeyError where there is none of that name."""
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """The last value of each scalar and its iteration."""
        return {name: history.values()[-1] for name, history in self._history.items()}

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """As `latest`, with the median over the last `window_size` iterations where the hint says so."""
        found = self.latest()
        for name, (_, last) in found.items():
            if self._smoothing_hints[name]:
                history = self._history[name]
                newest_first = enumerate(reversed(history.values()))
                older = (count for count, (_, i) in newest_first if i <= last - window_size)
                found[name] = (history.median(next(older, len(history.values()))), last)
        return found

    def __enter__(self) -> "EventStorage":
        _STORAGES.append(self)
        return self

    def __exit__(self, *exc_info) -> None:
        _STORAGES.pop()


class EventWriter:
    """Takes scalars from the current EventStorage, for writing them somewhere."""

    def __init__(self, window_size: int = 20):
        """Where a scalar's hint says so, its median over the last `window_size` iterations is written."""
        self._window_size = window_size
        self._last_write = -1

    def _new_scalars(self) -> list[tuple[str, float, int]]:
        """(name, value, iteration) of what was put for iterations after those of the last call."""
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        new = [(name, value, i) for name, (value, i) in latest.items() if i > self._last_write]
        self._last_write = max([self._last_write, *(iteration for _, _, iteration in new)])
        return new


class JSONWriter(EventWriter):
    """Append scalars to a file: one JSON object per line and iteration, with the key "iteration"."""

    def __init__(self, json_file: str, window_size: int = 20):
        super().__init__(window_size)
        self._file = PathManager.open(json_file, "a")

    def write(self) -> None:
        """Write the scalars that are new, and wait until they are on the disk."""
        lines = defaultdict(dict)
        for name, value, iteration in self._new_scalars():
            lines[iteration][name] = value
        for iteration, scalars in lines.items():
            self._file.write(json.dumps({**scalars, "iteration": iteration}, sort_keys=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorboardXWriter(EventWriter):
    """Write scalars as TensorBoard events into `log_dir`, which is made at the first write."""

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs):
        """`kwargs` go to torch.utils.tensorboard.SummaryWriter."""
        super().__init__(window_size)
        self._arguments = {"log_dir": log_dir, **kwargs}

    @cached_property
    def _writer(self):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always wanted

        return SummaryWriter(**self._arguments)

    def write(self) -> None:
        for name, value, iteration in self._new_scalars():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        if "_writer" in self.__dict__:
            self._writer.close()
