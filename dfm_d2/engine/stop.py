"""Ctrl-C and SIGTERM: the first asks a training to end after its step, a second ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

# A terminal tells all processes of a run, and the one that started the others tells them once more.
SECONDS_OF_ONE = 1.0


class Stopped(KeyboardInterrupt):
    """A training ended because it was asked to; its checkpoint is saved. Its argument is the signal."""


class StopSignals:
    """A context in which the first of them is kept in ``caught`` (0: none) and told to processes, no more."""

    def __init__(self, tell: Sequence[BaseProcess] = ()):
        self.caught = 0
        self._tell = tell
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other can have handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        """From now on the signals do again what they did before."""
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler or signal.SIG_DFL)

    def _handle(self, signum: int, frame: object) -> None:
        again = self.caught and time.monotonic() - self._at > SECONDS_OF_ONE
        if again or not self.caught:
            self.caught, self._at = signum, time.monotonic()
            for process in self._tell:
                process.terminate()
        if again:
            self.__exit__()
            os.kill(os.getpid(), signum)
