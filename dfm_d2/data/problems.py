"""What is wrong with a data set: collected with file names, counted, logged once, skipped or fatal."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

from dfm_d2.errors import UserError

# DATASETS.VERIFY_IMAGES: every image of sets up to this size is decoded, of larger ones the header is read.
DECODE_UP_TO = {"auto": 2000, "always": sys.maxsize, "never": 0}
SHOWN = 10  # problems that the log names one by one

Item, Made = TypeVar("Item"), TypeVar("Made")
logger = logging.getLogger(__name__)


class DataProblemError(UserError):
    """A data set has problems and DATASETS.ON_ERROR is "fatal"."""


class Problem(Exception):
    """One broken thing: the file it is in, its kind (a short constant word) and what is wrong."""

    def __init__(self, file: str, kind: str, message: str) -> None:
        super().__init__(file, kind, message)
        self.file, self.kind = file, kind

    def __str__(self) -> str:
        return "{0}: {2} [{1}]".format(*self.args)


class ProblemReport:
    """All problems of one data set, in the order in which they were found."""

    def __init__(self, dataset: str) -> None:
        self.dataset, self.problems = dataset, []

    def add(self, file: str, kind: str, message: str) -> None:
        self.problems.append(Problem(file, kind, message))

    def keep(self, make: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
        """`make(item)` of each item; one for which it raises a Problem is reported and left out."""
        made = []
        for item in items:
            try:
                made.append(make(item))
            except Problem as problem:
                self.add(*problem.args)  # a new one: a traceback would keep what was being read in memory
        return made

    def counts(self) -> dict[str, int]:
        """Number of problems of each kind, most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def conclude(self, usable: int, on_error: str) -> None:
        """Log what was found, if anything: counts by kind, then the first problems, one a line.

        usable: number of images that are left. on_error: the value of DATASETS.ON_ERROR.
        Raises DataProblemError for any problem if `on_error` is "fatal", UserError if no image is left.
        """
        number = len(self.problems)
        found = "1 problem" if number == 1 else f"{number} problems"
        if number and on_error == "fatal":
            named = "; ".join(map(str, self.problems[:3])) + ("; ..." if number > 3 else "")
            raise DataProblemError(
                f"Data set {self.dataset} has {found}: {named}. "
                'Repair the files, or set DATASETS.ON_ERROR to "skip" to go on without them.'
            )
        if number:
            counts = ", ".join(f"{count} {kind}" for kind, count in self.counts().items())
            lines = [f"data set {self.dataset}: {found} ({counts})"]
            lines += [f"  {problem}" for problem in self.problems[:SHOWN]]
            lines += [f"  ... and {number - SHOWN} more"] if number > SHOWN else []
            logger.warning("\n".join([*lines, "They are skipped (DATASETS.ON_ERROR skip)."]))
        if not usable:
            raise UserError(f"The data set {self.dataset} has no usable image: check its files.")
