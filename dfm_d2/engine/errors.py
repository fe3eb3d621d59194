"""The errors that a user is meant to read: each message is one sentence that says what to do."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Something that the user gave is wrong; tools print it as one sentence and exit with status 2."""


class CheckpointError(UserError):
    """A checkpoint or weight file is missing, damaged, or belongs to another model."""


class UnsafeFileError(CheckpointError):
    """A file asks for code to be run when it is loaded. Nothing of it was run."""


class NonFiniteLossError(FloatingPointError):
    """A loss or the gradient of a block is infinite or not a number.

    Raised before any parameter of the iteration is stepped, or with ``STEP_IN_BACKWARD`` before the
    offending block is stepped: the blocks before it have been, in memory only.
    """

    def __init__(
        self,
        values: dict[str, float],
        iteration: int | None = None,
        image_ids: Sequence[object] = (),
        raised_by: object = None,
    ):
        """
        values: the offending entries by their key, such as ``{"loss_cls/p0": nan}``.
        raised_by: the group of processes that all raise it, each knowing its own images; None: this alone.
        """
        self.raised_by = raised_by
        self.values = dict(values)
        self.iteration = iteration
        self.image_ids = list(image_ids)
        what = ", ".join(f"{key} = {value}" for key, value in self.values.items())
        where = "" if iteration is None else f" at iteration {iteration}, image ids {self.image_ids}"
        super().__init__(
            f"Not finite{where}: {what}. The last checkpoint is intact: lower SOLVER.BASE_LR or "
            "SOLVER.BLOCK_CLIP_NORM, or look at these images, then continue with --resume."
        )

    def at(self, iteration: int, image_ids: Sequence[object]) -> "NonFiniteLossError":
        """The same error with the iteration and the images of its batch named."""
        return NonFiniteLossError(self.values, iteration, image_ids)


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
