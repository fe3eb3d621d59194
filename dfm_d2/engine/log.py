"""The log of a run: lines on stdout and, the same, in log.txt of its folder.

Detectron2's setup_logger adds handlers for good, so that a second run in the same process (a benchmark, a
test) would write its lines twice, and into the first one's folder.
"""

import contextlib
import logging
import sys
from pathlib import Path

from tqdm import tqdm

LOGGERS = ("dfm_d2", "detectron2", "fvcore")

_handlers: list[logging.Handler] = []


class _Formatter(logging.Formatter):
    """``[11/23 14:50:33] dfm_d2.engine.run: text``, with the level named from warnings on."""

    def __init__(self) -> None:
        super().__init__("[%(asctime)s] %(name)s: %(message)s", datefmt="%m/%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        return line if record.levelno < logging.WARNING else f"{record.levelname} {line}"


class _StdoutHandler(logging.Handler):
    """Writes to what ``sys.stdout`` is now, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


class _FileHandler(logging.FileHandler):
    """Where the disk is full, says so once on stderr; logging would print a traceback a line."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
        elif not self._said:
            self._said = True
            print(f"warning: {self.baseFilename} takes no more: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the rest of what it takes no more
            super().close()


def start_log(folder: str, is_main: bool) -> None:
    """Send the log of dfm_d2, Detectron2 and fvcore to stdout and ``folder``/log.txt, in the main process.

    A later call takes over from an earlier one.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for handler in _handlers:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
    _handlers.clear()
    if is_main:
        _handlers.extend([_StdoutHandler(), _FileHandler(Path(folder) / "log.txt", encoding="utf-8")])
    for handler in _handlers:
        handler.setFormatter(_Formatter())
    for logger in loggers:
        logger.setLevel(logging.INFO)
        for handler in _handlers:
            logger.addHandler(handler)
