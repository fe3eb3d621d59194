"""Writing files so that a crash at any moment leaves the old file or the new one, never half of one."""

import itertools
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

# A process that is killed while it writes leaves a file with 8 digits and this suffix behind.
TEMPORARY_SUFFIX = ".partial"


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, then move it there in one step.

    The folder is made if need be. The content is on the disk before the name is, and the name before this
    returns. Whatever ``write`` raises goes through, and ``path`` is then what it was before; an error of the
    operating system, such as a full disk, names ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        # Of this process alone: a file or a link of that name is neither opened nor followed.
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save hides what the operating system said in a RuntimeError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    if os.name != "nt":  # which cannot open a folder
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text_atomically(path: str | os.PathLike, text: str) -> None:
    """``write_atomically`` for a UTF-8 text."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def remove_partial_files(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Remove what killed writers left in ``folder`` of files with these names, which are patterns."""
    for name in names:
        for path in Path(folder).glob(f"{name}.{'[0-9a-f]' * 8}{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)


def paths_by_stem(files: Sequence[str | os.PathLike], folder: Path, ending: str) -> list[Path]:
    """A path in `folder` of the stem of each file, with a number where an earlier file has that stem."""
    found: list[Path] = []
    for stem in (Path(file).stem for file in files):
        names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        found.append(next(path for name in names if (path := folder / f"{name}{ending}") not in found))
    return found
