"""metrics.json: one JSON object a line, cut back when training resumes from an earlier checkpoint. And the
calibration error, a metric of both verticals.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dfm_d2.data.files import write_text_atomically
from dfm_d2.errors import UserError

METRICS_FILE = "metrics.json"
_BINS = 15  # of the calibration error


def calibration_error(scores: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error, in percent (arXiv 1706.04599, equation 3), over 15 bins of equal width.

    scores: `(n,)` in [0, 1]. right: bool `(n,)`. NaN where n is 0.
    """
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, right - scores, minlength=_BINS)
    return 100 * float(np.abs(gaps).sum()) / len(scores) if len(scores) else math.nan


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none where it does not exist. A torn last line is left out.

    Raises UserError naming the line where another one is damaged.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_bytes().rstrip().split(b"\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line) if line.strip() else {}
            if not isinstance(entry, dict) or not all(isinstance(v, int | float) for v in entry.values()):
                raise ValueError("it is no object of numbers")
            entries += [entry] if entry else []
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is damaged; move the file away.") from error
    return entries


def append_metrics(path: str | Path, iteration: int, results: Mapping[str, Any]) -> None:
    """Add the line of an evaluation that was no part of a training."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(_line({"iteration": iteration, **flatten(results)}))


def cut_back(path: str | Path, start_iteration: int) -> None:
    """Drop the lines of iteration ``start_iteration`` and later, which are about to be trained again.

    Atomic: a kill leaves the old file or the new one.
    """
    kept = [entry for entry in read_metrics(path) if entry.get("iteration", -1) < start_iteration]
    if Path(path).exists():
        write_text_atomically(path, "".join(map(_line, kept)))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"


def flatten(results: Mapping[str, Any]) -> dict[str, float]:
    """{"bbox": {"AP": 1.0}} as {"bbox/AP": 1.0}; NaN (a class without objects) is left out."""
    flat: dict[str, float] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{inner}": number for inner, number in flatten(value).items()}
        elif not math.isnan(float(value)):
            flat[key] = float(value)
    return flat
