"""What is wrong with a data set: collected with file names, counted, logged once, skipped or fatal."""

import logging
import sys
from collections import Counter
from dataclasses import dataclass, field

# DATASETS.VERIFY_IMAGES: every image of sets up to this size is decoded, of larger ones the header is read
_DECODE_UP_TO = {"auto": 2000, "always": sys.maxsize, "never": 0}
SHOWN = 10  # problems that the summary names one by one


class DataProblemError(ValueError):
    """A data set has problems and DATASETS.ON_ERROR is "fatal"."""


@dataclass(frozen=True)
class Problem:
    """One broken thing: the file it is in, its kind (a short constant word) and one sentence about it."""

    file: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message} [{self.kind}]"


@dataclass
class ProblemReport:
    """All problems of one data set, in the order in which they were found."""

    dataset: str
    problems: list[Problem] = field(default_factory=list)

    def add(self, file: str, kind: str, message: str) -> None:
        self.problems.append(Problem(str(file), kind, message))

    def __len__(self) -> int:
        return len(self.problems)

    def counts(self) -> dict[str, int]:
        """Number of problems of each kind, most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def files(self, kind: str | None = None) -> list[str]:
        """Files with a problem (of that kind), in the order found, each once."""
        return list(dict.fromkeys(p.file for p in self.problems if kind in (None, p.kind)))

    def summary(self) -> str:
        """Counts by kind on the first line, then the first problems, one a line."""
        counts = ", ".join(f"{number} {kind}" for kind, number in self.counts().items())
        lines = [f"data set {self.dataset}: {_count(len(self))} ({counts})"]
        lines += [f"  {problem}" for problem in self.problems[:SHOWN]]
        if len(self) > SHOWN:
            lines.append(f"  ... and {len(self) - SHOWN} more")
        return "\n".join(lines)

    def conclude(self, on_error: str, logger: logging.Logger) -> None:
        """Log the summary, or raise DataProblemError if `on_error` is "fatal"; nothing if all is well."""
        if not self.problems:
            return
        if on_error == "fatal":
            named = "; ".join(str(problem) for problem in self.problems[:3])
            more = "; ..." if len(self) > 3 else ""
            raise DataProblemError(
                f"Data set {self.dataset} has {_count(len(self))}: {named}{more}. "
                'Repair the files, or set DATASETS.ON_ERROR to "skip" to go on without them.'
            )
        logger.warning("%s\nThey are skipped (DATASETS.ON_ERROR skip).", self.summary())


def _count(number: int) -> str:
    return "1 problem" if number == 1 else f"{number} problems"


def check_on_error(value: str) -> str:
    """Return `value` if DATASETS.ON_ERROR may have it, else raise ValueError."""
    if value not in ("skip", "fatal"):
        raise ValueError(f'DATASETS.ON_ERROR is {value!r}: set it to "skip" or "fatal".')
    return value


def decode_limit(verify: str) -> int:
    """The size up to which every image of a set is decoded, for a value of DATASETS.VERIFY_IMAGES.

    Raises ValueError for a value that is not known.
    """
    if verify not in _DECODE_UP_TO:
        raise ValueError(f"DATASETS.VERIFY_IMAGES is {verify!r}: set it to one of {tuple(_DECODE_UP_TO)}.")
    return _DECODE_UP_TO[verify]
