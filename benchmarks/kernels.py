#!/usr/bin/env python
"""Microbenchmarks of the ops of dfm_kernels, and their compilation without a GPU.

python benchmarks/kernels.py --aot                 registers, spills and shared memory of what ships
python benchmarks/kernels.py --device cuda --save  eager, torch.compile and Triton against the bytes' floor
python benchmarks/kernels.py --device cpu          the same without Triton (which has no CPU backend)
    --ops box_flow_update    only these ops
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from dfm_kernels import ops, reference  # noqa: E402
from rows import Row, commit, device_name, quantiles, save_rows  # noqa: E402

# (B, N, D, K): VOC and COCO inference, shared time, LVIS' classes, a training batch.
GRID = ((1, 300, 1, 20), (1, 300, 6, 20), (8, 300, 6, 80), (16, 500, 6, 80), (16, 500, 1, 1203))
_TOLERANCE = {"rtol": 1e-5, "atol": 1e-3}


class Case(NamedTuple):
    """One op at one size. eager: its reference. op: with a backend. num_bytes: read and written at least."""

    eager: Callable[[], tuple]
    op: Callable[[str], tuple]
    num_bytes: int


class Gradients(NamedTuple):
    """Of a loss by the logits and by the boxes."""

    logits: torch.Tensor
    boxes: torch.Tensor


def box_flow_update(b: int, n: int, d: int, k: int, device: str) -> Case:
    """Inference's step; answers and logits in float32."""
    x_t = torch.randn(b, n, 4, device=device)
    answers, logits = torch.randn(d, b, n, 4, device=device), torch.randn(d, b, n, k, device=device)
    t, t_next = torch.full((b,), 0.25, device=device), torch.full((b,), 0.5, device=device)
    sizes = torch.tensor([[480.0, 640.0]], device=device).repeat(b, 1)
    arguments = (x_t, answers, logits, t, t_next, sizes)
    options = {
        "signal_scale": 2.0,
        "box_weights": (2.0, 2.0, 1.0, 1.0),
        "prediction": "endpoint",
        "aggregation": "uniform",
    }
    num_bytes = 4 * (answers.numel() + logits.numel() + 5 * x_t.numel() + b * n * k)
    return Case(
        lambda: reference.box_flow_update(*arguments, **options),
        lambda backend: ops.box_flow_update(*arguments, **options, backend=backend),
        num_bytes,
    )


def sample_box_paths(b: int, n: int, d: int, k: int, device: str) -> Case:
    """Inputs of D predictors in training; K does not enter."""
    seed = torch.arange(b, device=device)
    offset = torch.zeros((), dtype=torch.int64, device=device)
    x_1 = torch.randn(b, n, 4, device=device)
    t = torch.rand(d, b, device=device)
    sizes = torch.tensor([[480.0, 640.0]], device=device).repeat(b, 1)
    arguments = (seed, offset, x_1, t, sizes)
    return Case(
        lambda: reference.sample_box_paths(*arguments, signal_scale=2.0),
        lambda backend: ops.sample_box_paths(*arguments, signal_scale=2.0, backend=backend),
        4 * x_1.numel() * (3 + 2 * d),
    )


def flow_loss(b: int, n: int, d: int, k: int, device: str) -> Case:
    """Training's loss of one predictor, forward and backward, logits in float32; D does not enter."""
    logits = torch.randn(b, n, k, device=device, requires_grad=True)
    x_1_hat = torch.randn(b, n, 4, device=device, requires_grad=True)
    target = torch.randn(b, n, 4, device=device)
    classes = torch.randint(0, k + 1, (b, n), device=device)
    t, normalizer = torch.rand(b, device=device), torch.tensor(float(b * n), device=device)
    options = {"signal_scale": 2.0, "kind": "focal", "alpha": 0.25, "gamma": 2.0, "velocity_max": 25.0}

    def gradients(loss: Callable, **more) -> Gradients:
        terms = loss(logits, x_1_hat, classes, target, t, normalizer, **options, **more)
        return Gradients(*torch.autograd.grad(sum(terms), (logits, x_1_hat)))

    return Case(
        lambda: gradients(reference.flow_loss),
        lambda backend: gradients(ops.flow_loss, backend=backend),
        4 * (2 * logits.numel() + 3 * x_1_hat.numel() + 2 * classes.numel()),
    )


OPS = {"box_flow_update": box_flow_update, "sample_box_paths": sample_box_paths, "flow_loss": flow_loss}
MODES = {"flow_loss": "forward and backward"}


def measure(run: Callable[[], object], device: str) -> tuple[float, float, float]:
    """Milliseconds of one call: p20, p50, p80."""
    if device == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(run, quantiles=[0.2, 0.5, 0.8]))
    for _ in range(3):
        run()
    times, begun = [], time.perf_counter()
    while len(times) < 20 or (time.perf_counter() - begun < 0.5 and len(times) < 1000):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return quantiles(times)


def launches(run: Callable[[], object]) -> int:
    """Kernels that one call launches on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profiled.key_averages() if event.device_type.name == "CUDA")


def peak_mib(run: Callable[[], object]) -> float:
    """MiB that one call allocates at most at a time on the GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rows_of(op: str, size: tuple[int, int, int, int], device: str) -> list[Row]:
    """Rows of one op at one size, after what will be timed has been compared with the reference."""
    case, mode = OPS[op](*size, device), MODES.get(op, "forward")
    providers: dict[str, Callable[[], object]] = {"eager": case.eager}
    torch._dynamo.reset()
    providers["compile"] = torch.compile(case.eager)
    if device == "cuda":
        providers["triton"] = lambda: case.op("triton")
    else:
        providers["auto"] = lambda: case.op("auto")
    expected = case.eager()
    for name, run in providers.items():
        for field, a, b in zip(expected._fields, run(), expected):
            torch.testing.assert_close(
                a, b, **_TOLERANCE, msg=lambda m, f=field, n=name: f"{op} {n} {f}: {m}"
            )
    tail = (device_name(device), torch.__version__, commit())
    label = "B={} N={} D={} K={}".format(*size)
    source = torch.empty(case.num_bytes // 2 // 4, device=device)  # a clone reads and writes
    clone = measure(source.clone, device)
    rows = [Row(op, "clone of as many bytes", mode, "time", "ms", "size", label, *clone, *tail)]
    for name, run in providers.items():
        times = measure(run, device)
        rows.append(Row(op, name, mode, "time", "ms", "size", label, *times, *tail))
        if device == "cuda":
            found = {
                ("share of a clone's bandwidth", "%"): 100 * clone[1] / times[1],
                ("launches", ""): float(launches(run)),
                ("peak memory", "MiB"): peak_mib(run),
            }
            for (metric, unit), value in found.items():
                rows.append(Row(op, name, mode, metric, unit, "size", label, *[value] * 3, *tail))
    print(f"{op} {label}: " + ", ".join(f"{r.provider} {r.p50:.4f} ms" for r in rows if r.metric == "time"))
    return rows


def ahead_of_time() -> int:
    """Compile everything that ships for every target and print it; the number of spilling kernels."""
    from dfm_kernels.triton.ahead_of_time import TARGETS, compile_for, configurations

    compiled = [compile_for(c, target) for c in configurations() for target in TARGETS]
    print(f"{'configuration':48} {'target':8} {'registers':>9} {'spills':>7} {'shared':>7}")
    for c in compiled:
        print(f"{c.configuration:48} {c.target:8} {c.registers:9} {c.spills:7} {c.shared:7}")
    spilling = sum(c.spills > 0 for c in compiled)
    print(f"spills: {spilling} in {len(compiled)} kernels")
    return spilling


def main() -> int:
    """Exit status: 1 if a kernel spills."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--aot", action="store_true", help="compile without a GPU, measure nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/kernels_<device>.csv")
    args = parser.parse_args()
    if args.aot:
        return int(ahead_of_time() > 0)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: use --device cpu, or --aot")
    torch.manual_seed(0)
    rows = [row for op in args.ops for size in GRID for row in rows_of(op, size, args.device)]
    if args.save:
        print(save_rows(f"kernels_{args.device}", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
