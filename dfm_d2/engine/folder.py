"""The folder of a run: can it be written, who writes in it, what does a run continue from. Needs no torch."""

import contextlib
import errno
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dfm_d2.data.files import remove_partial_files
from dfm_d2.errors import CheckpointError, UserError, input_errors

try:
    import fcntl
except ImportError:  # Windows: there is no lock
    fcntl = None

LAST = "last_checkpoint"  # names the checkpoint that --resume takes
WRITTEN = ("model_*.pth", "config.yaml", "metrics.json", LAST, "inference/**/*")  # atomically, by a run

_logger = logging.getLogger(__name__)


def last_checkpoint(folder: str, resume: bool) -> str:
    """The checkpoint that a run continues from; empty: none is there, or it was not asked for.

    Raises CheckpointError where ``last_checkpoint`` names a file that is not there.
    """
    pointer = Path(folder) / LAST
    if not resume or not pointer.is_file():
        return ""
    path = pointer.parent / os.path.basename(pointer.read_text("utf-8", errors="replace").strip())
    if not path.is_file():
        said = "which is not there: write the name of another checkpoint into it, or delete it to start anew."
        raise CheckpointError(f"{pointer} names {path.name!r}, {said}")
    return str(path)


def check_folder(folder: str) -> None:
    """Make ``OUTPUT_DIR`` if need be; UserError unless files can be made in it."""
    if not folder.strip():
        raise UserError("OUTPUT_DIR is empty: name the folder that the run is to write to.")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", error)
        raise UserError(f"OUTPUT_DIR {folder!r} cannot be written to ({reason}): name another.") from error


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Within it no other run writes to ``folder``; what killed ones left half-written there is removed.

    Raises UserError naming the process and host of a run that is at it. The lock is the kernel's, which frees
    it when its owner dies, however that happens; and processes that the owner forks do not inherit it.
    """
    path = Path(folder) / "run.lock"
    descriptor = _lock(path)
    try:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        remove_partial_files(folder, WRITTEN)
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    """The descriptor of the locked file; None where there are no locks."""
    while fcntl is not None:
        with input_errors():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 300).decode(errors="replace") or "another run"
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                said = f"{path.parent} is in use by {owner}: wait for its end, or name another OUTPUT_DIR."
                raise UserError(said) from None
            _logger.warning("%s cannot be locked (%s): let no other run write there", path, error.strerror)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # the file of a run that has just ended: another may have made a new one
    return None
