"""The errors that a user is meant to read: each message is one line that says what to do."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """Something that the user gave is wrong; tools print it as one line and exit with status 2."""


class CheckpointError(UserError):
    """A checkpoint or weight file is missing, damaged, or belongs to another model."""


class UnsafeFileError(CheckpointError):
    """A file asks for code to be run when it is loaded. Nothing of it was run."""


def report(error: Exception, who: str = "") -> int:
    """Print an error that says all there is to say; with DFM_DEBUG=1 its traceback, too.

    who: which of several processes it was. Returns the exit status: 2 for a UserError, else 1.
    """
    if os.environ.get("DFM_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"error{who}: {error}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, UserError) else 1


# What a disk says that takes no more.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def output_errors() -> Iterator[None]:
    """Around code that writes the files of a run: a full or broken disk becomes a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(
            f"Could not write {error.filename or 'the files of the run'}: {error.strerror}. Checkpoints that "
            "were there are intact: make room on that disk, then continue with --resume."
        ) from error


@contextmanager
def input_errors() -> Iterator[None]:
    """Around code that reads or makes what the user named: an OSError with a file becomes a UserError."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{str(error.filename)[-200:]}: {error.strerror}.") from error


def exit_status(run: Callable[..., int | None], *arguments: Any) -> int:
    """The exit status of a command: what ``run`` returns (None: 0), or 2 where the user erred."""
    try:
        with input_errors():
            return run(*arguments) or 0
    except UserError as error:
        return report(error)
