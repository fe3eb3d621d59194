"""The errors that a user is meant to read: each message is one sentence that says what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something that the user gave is wrong; tools print it as one sentence and exit with status 2."""


class CheckpointError(UserError):
    """A checkpoint or weight file is missing, damaged, or belongs to another model."""


class UnsafeFileError(CheckpointError):
    """A file asks for code to be run when it is loaded. Nothing of it was run."""


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
    """Around code that reads what the user gave: its ValueError and OSError become a UserError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
