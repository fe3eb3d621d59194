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
    """The history of each scalar, by name, with the iteration at which each value was put."""

    def __init__(self, start_iter: int = 0):
        self.iter = start_iter
        self._history: dict[str, HistoryBuffer] = {}
        self._smoothing_hints: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}

    @property
    def iter(self) -> int:
        return self._iter

    @iter.setter
    def iter(self, value: int) -> None:
        self._iter = int(value)

    def step(self) -> None:
        """Go to the next iteration."""
        self._iter += 1

    def put_scalar(
        self, name: str, value: float, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Add a value. `smoothing_hint` tells writers to show the median of the last ones.

        Raises AssertionError where a name is put with another hint than before.
        """
        value = float(value)
        iteration = self._iter if cur_iter is None else cur_iter
        assert self._smoothing_hints.setdefault(name, smoothing_hint) == smoothing_hint, (
            f"scalar {name} was put with another smoothing_hint before"
        )
        self._history.setdefault(name, HistoryBuffer()).update(value, iteration)
        self._latest[name] = (value, iteration)

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: float
    ) -> None:
        """Add several values."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def history(self, name: str) -> HistoryBuffer:
        """All values of a scalar; raises KeyError where there is none of that name."""
        if name not in self._history:
            raise KeyError(f"no scalar {name} has been put")
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """The last value of each scalar and its iteration."""
        return self._latest

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """As `latest`, with the median over the last `window_size` iterations where the hint says so."""
        return {
            name: (
                self._history[name].median(self.count_samples(name, window_size))
                if self._smoothing_hints[name]
                else value,
                iteration,
            )
            for name, (value, iteration) in self._latest.items()
        }

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """How many of the last values were put within `window_size` iterations of the last one."""
        values = self._history[name].values()
        first = values[-1][1] - window_size
        count = 0
        for _, iteration in reversed(values):
            if iteration <= first:
                break
            count += 1
        return count

    def __enter__(self) -> "EventStorage":
        _STORAGES.append(self)
        return self

    def __exit__(self, *exc_info) -> None:
        assert _STORAGES[-1] is self, "EventStorages must be left in the opposite order of entering"
        _STORAGES.pop()


class EventWriter:
    """Takes scalars from the current EventStorage and writes them somewhere."""

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

    def write(self) -> None:
        """Write the scalars that are new."""
        raise NotImplementedError(f"{type(self).__name__} must define write")

    def close(self) -> None:
        """Nothing, unless overridden."""


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
