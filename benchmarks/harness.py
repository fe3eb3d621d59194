"""What the benchmarks share: rows of results, timing, pictures, and a detector with random weights.

All benchmarks have one schema of rows, kept in CSV files under benchmarks/results/.
"""

import argparse
import csv
import multiprocessing
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, installed or not

MIB = 2**20
# Of a line in a picture: x, then the quantiles p20, p50, p80.
Line = Sequence[tuple[float, float, float, float]]


class Row(NamedTuple):
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


def measured(*where: object, values: Sequence[float], on: str, note: str = "", made_by: str = "") -> Row:
    """The row of values.

    where: op to x_value. on: the hardware, see `device_name`. made_by: the commit, if it is not this one.
    """
    return Row(*map(str, where), *quantiles(values), on, torch.__version__, made_by or commit(), note)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80 of at least one value."""
    return tuple(np.quantile(values, (0.2, 0.5, 0.8)).tolist())


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
        return subprocess.check_output(
            ["git", *arguments], cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load_rows(name: str) -> list[Row]:
    """The rows of benchmarks/results/<name>.csv; none where it does not exist."""
    path, numbers = RESULTS / f"{name}.csv", ("p20", "p50", "p80")
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Row(**row | {key: float(row[key]) for key in numbers}) for row in csv.DictReader(file)]


def save_rows(name: str, rows: Iterable[Row]) -> Path:
    """Write benchmarks/results/<name>.csv. Returns the path.

    Rows of other things than `rows` are kept: another call measured them.
    """

    def measured_thing(row: Row) -> tuple:
        return row.op, row.provider, row.mode, row.metric, row.x_name, str(row.x_value)

    path, rows = RESULTS / f"{name}.csv", list(rows)
    again = set(map(measured_thing, rows))
    kept = [old for old in load_rows(name) if measured_thing(old) not in again]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *kept, *rows])
    return path


def reported(rows: Iterable[Row], name: str = "") -> list[Row]:
    """The rows, after each has been printed as soon as it is there; with a name, all are saved."""
    found = []
    for row in rows:
        print(
            f"{row.op:24s} {row.provider:18s} {row.mode:12s} {row.x_name}={row.x_value:24s} "
            f"{row.metric} {row.p50:.4g} {row.unit} [{row.p20:.4g}, {row.p80:.4g}]",
            flush=True,
        )
        found.append(row)
    if name:
        print(save_rows(name, found))
    return found


def raw_parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """One that prints its texts as they are."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=raw)


def arguments(description: str, *devices: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark of speed or memory has. devices: those besides cpu and cuda."""
    parser = raw_parser(description)
    parser.add_argument("--device", choices=("cpu", "cuda", *devices), default="cpu")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.csv")
    parser.add_argument("--name", help="of the rows; else what is measured, and the device")
    return parser


def parsed(parser: argparse.ArgumentParser, usual: Callable) -> argparse.Namespace:
    """The command line. usual: of it, what stands for what it leaves out; its name is without the device."""
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: use --device cpu")
    for key, value in usual(args).items():
        value = f"{value}_{args.device}" if key == "name" else value
        setattr(args, key, getattr(args, key, None) or value)
    return args


def lines_of(rows: Iterable[Row], name: Callable[[Row], str] = lambda row: row.provider) -> dict[str, Line]:
    """The points of rows whose x is a number, in its order: a line for each name."""
    rows = list(rows)
    lines: dict[str, list] = {name(row): [] for row in rows}
    for row in sorted(rows, key=lambda row: float(row.x_value)):
        lines[name(row)].append((float(row.x_value), row.p20, row.p50, row.p80))
    return lines


def draw_panels(
    path: Path, title: str, y_label: str, panels: Mapping[str, tuple[str, dict[str, Line]]]
) -> Path:
    """One panel a question, one line and colour a method, quantiles as a band.

    panels: {title of the panel: (label of its x axis, {method: line})}.
    """
    from matplotlib.ticker import MaxNLocator

    from dfm_d2.visualize.figures import plt, save_figure

    names = list(dict.fromkeys(name for _, lines in panels.values() for name in lines))
    options = {"layout": "constrained", "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(panels), figsize=(2.2 + 2.8 * len(panels), 3.8), **options)
    for axis, (question, (x_label, lines)) in zip(axes[0], panels.items()):
        for name, points in lines.items():
            index, (x, low, middle, high) = names.index(name), zip(*points)
            # Thin lines above thick ones: some coincide.
            style = {"marker": "o", "markersize": 3.5, "linewidth": max(3 - index / 2, 1)}
            axis.plot(x, middle, color=f"C{index % 10}", label=name, **style)
            axis.fill_between(x, low, high, color=f"C{index % 10}", alpha=0.15, linewidth=0)
        axis.set_xlabel(x_label)
        axis.set_title(question, fontsize=9)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_ylabel(y_label)
    handles = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(names), 6), fontsize=8)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, path)


def synchronize(device: str) -> None:
    """Wait for the GPU, if that is where we compute."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def repeated(run: Callable[[], object], device: str) -> list[float]:
    """Milliseconds of calls: at least 20, and for half a second (on a GPU what Triton's do_bench takes)."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="all")
    for _ in range(3):
        run()
    times = []
    while len(times) < 20 or (sum(times) < 500 and len(times) < 1000):
        times.append(timed(run, device))
    return times


def in_turns(runs: Mapping[str, Callable], device: str, repeats: int, warm_up=1) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each: all in turns, so that drift of the machine hits all alike."""
    rounds = [{name: timed(run, device) for name, run in runs.items()} for _ in range(warm_up + repeats)]
    return {name: [times[name] for times in rounds[warm_up:]] for name in runs}


def alone(function: Callable, *arguments: object) -> Any:
    """What a function of a module answers in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def launches(run: Callable[[], object]) -> int:
    """Kernels that one call launches on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    timed(run, "cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        timed(run, "cuda")
    return sum(event.count for event in profiled.key_averages() if event.device_type.name == "CUDA")


def peak_mib(run: Callable[[], object]) -> float:
    """MiB that one call allocates at most at a time on the GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    timed(run, "cuda")
    return (torch.cuda.max_memory_allocated() - before) / MIB


def random_detector(config: str, opts: Sequence[object]) -> tuple:
    """The config and the detector of a file and KEY VALUE overrides: weights of seed 0, evaluation mode.

    20 classes where the config leaves their number to the data.
    """
    import dfm_d2.registry  # noqa: F401  (registers the meta-architectures)
    from dfm_d2.detection.task import DETECTION
    from dfm_d2.engine.setup import load_config
    from dfm_d2.framework import build_model

    cfg = load_config(DETECTION, config, ["MODEL.WEIGHTS", "", *map(str, opts)])
    cfg.MODEL.DFM.NUM_CLASSES = cfg.MODEL.DFM.NUM_CLASSES or 20
    torch.manual_seed(0)
    return cfg, build_model(cfg).eval()
