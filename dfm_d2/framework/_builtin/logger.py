"""Log lines on the terminal and in a file."""

import functools
import logging
import os
import sys

from termcolor import colored

_TIME = "%m/%d %H:%M:%S"


class _TerminalFormatter(logging.Formatter):
    """Short names, and warnings that are seen."""

    def __init__(self, name: str, abbrev_name: str):
        super().__init__(colored("[%(asctime)s %(name)s]: ", "green") + "%(message)s", datefmt=_TIME)
        self._prefix = name + "."
        self._short_prefix = abbrev_name + "." if abbrev_name else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.name = record.name.replace(self._prefix, self._short_prefix, 1)
        line = super().formatMessage(record)
        return line if record.levelno < logging.WARNING else f"{colored(record.levelname, 'red')} {line}"


@functools.lru_cache  # a second call with the same arguments adds no second handler
def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "dfm_d2",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Send the log lines of `name` to stdout (rank 0 only) and to a file.

    `output` is a file that ends in .txt or .log, or a folder, in which `log.txt` is written; None: no file.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    plain = logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt=_TIME)
    if configure_stdout and distributed_rank == 0:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_TerminalFormatter(name, abbrev_name or name) if color else plain)
        logger.addHandler(handler)
    if output is not None:
        path = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
        if distributed_rank > 0:
            path += f".rank{distributed_rank}"
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        handler = logging.FileHandler(path, mode="a")
        handler.setFormatter(plain)
        logger.addHandler(handler)
    return logger
