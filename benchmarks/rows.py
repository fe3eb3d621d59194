"""Rows of measurements: one schema for all benchmarks, appended to a CSV file under benchmarks/results/."""

import csv
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One measurement. p20, p50, p80: quantiles over repetitions (all equal for a single one)."""

    op: str
    provider: str
    mode: str
    metric: str
    unit: str
    x_name: str
    x_value: str
    p20: float
    p50: float
    p80: float
    device: str
    torch: str
    commit: str
    note: str = ""


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80 of at least one value."""
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def device_name(device: str) -> str:
    """The hardware in words, such as "cuda: NVIDIA H200" or "cpu: AMD EPYC, 2 threads"."""
    if device == "cuda":
        return f"cuda: {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return f"cpu: {model}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The short commit, with "+" if tracked files differ from it; "unknown" outside a git checkout.

    Results do not count: every benchmark changes them.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load_rows(name: str) -> list[Row]:
    """The rows of benchmarks/results/<name>.csv."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return [
            Row(**row | {key: float(row[key]) for key in ("p20", "p50", "p80")})
            for row in csv.DictReader(file)
        ]


def save_rows(name: str, rows: Iterable[Row]) -> Path:
    """Write benchmarks/results/<name>.csv; print each row's gist. Returns the path.

    Rows of pairs of op and provider that are not among `rows` are kept: another call measured them.
    """
    path, rows = RESULTS / f"{name}.csv", list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            measured = {(row.op, row.provider) for row in rows}
            kept = [old for old in csv.DictReader(file) if (old["op"], old["provider"]) not in measured]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(kept)
        for row in rows:
            writer.writerow(asdict(row))
            print(
                f"{row.op:24s} {row.provider:14s} {row.mode:12s} {row.x_name}={row.x_value:24s} "
                f"{row.metric} {row.p50:.4g} {row.unit} [{row.p20:.4g}, {row.p80:.4g}]",
                flush=True,
            )
    return path
