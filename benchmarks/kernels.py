#!/usr/bin/env python
"""Microbenchmarks of the ops of dfm_kernels, and their compilation without a GPU.

python benchmarks/kernels.py --aot                 registers, spills and shared memory of what ships
python benchmarks/kernels.py --device cuda --save  eager, torch.compile and Triton against the bytes' floor
python benchmarks/kernels.py --device cpu          the same without Triton (which has no CPU backend)
    --ops box_flow_update    only these ops
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import dfm_kernels  # noqa: E402
from rows import RESULTS, Row, commit, device_name, save_rows  # noqa: E402
from timing import launches, measure, peak_mib  # noqa: E402

# (B, N, D, K): VOC and COCO inference, shared time, LVIS' classes, a training batch; and what a CPU can do.
GRIDS = {
    "cuda": ((1, 300, 1, 20), (1, 300, 6, 20), (8, 300, 6, 80), (16, 500, 6, 80), (16, 500, 1, 1203)),
    "cpu": ((1, 100, 1, 20), (1, 300, 6, 20), (4, 100, 1, 80)),
}
# Relative to the largest element; TF32 and bfloat16 keep 11 and 8 bits, and sums of 256 of them fewer.
_TOLERANCE = {
    "box_flow_update": 1e-5,
    "flow_loss": 1e-5,
    "multilevel_roi_align": 1e-4,
    "dynamic_interaction": 5e-2,
}


class Case(NamedTuple):
    """One op at one size. run: calls it, or its reference, on the inputs. num_bytes: read and written at
    least."""

    run: Callable[[Callable], tuple]
    num_bytes: int


class Gradients(NamedTuple):
    """Of a loss by the logits and by the boxes."""

    logits: torch.Tensor
    boxes: torch.Tensor


class Pyramid(NamedTuple):
    """Pooled features, and gradients by four levels."""

    pooled: torch.Tensor
    p2: torch.Tensor
    p3: torch.Tensor
    p4: torch.Tensor
    p5: torch.Tensor


class Interaction(NamedTuple):
    """The answer, and gradients by the grid and the two matrices."""

    mixed: torch.Tensor
    roi: torch.Tensor
    weight_in: torch.Tensor
    weight_out: torch.Tensor


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
        "aggregation": "uniform",
    }
    num_bytes = 4 * (answers.numel() + logits.numel() + 5 * x_t.numel() + b * n * k)
    return Case(lambda update: update(*arguments, **options), num_bytes)


def flow_loss(b: int, n: int, d: int, k: int, device: str) -> Case:
    """Training's loss of one predictor, forward and backward, logits in float32; D does not enter."""
    logits = torch.randn(b, n, k, device=device, requires_grad=True)
    x_1_hat = torch.randn(b, n, 4, device=device, requires_grad=True)
    target = torch.randn(b, n, 4, device=device)
    classes = torch.randint(0, k + 1, (b, n), device=device)
    t, normalizer = torch.rand(b, device=device), torch.tensor(float(b * n), device=device)
    options = {"signal_scale": 2.0, "kind": "focal", "alpha": 0.25, "gamma": 2.0, "velocity_max": 25.0}

    def gradients(loss: Callable) -> Gradients:
        terms = loss(logits, x_1_hat, classes, target, t, normalizer, **options)
        return Gradients(*torch.autograd.grad(sum(terms), (logits, x_1_hat)))

    return Case(gradients, 4 * (2 * logits.numel() + 3 * x_1_hat.numel() + 2 * classes.numel()))


def multilevel_roi_align(b: int, n: int, d: int, k: int, device: str) -> Case:
    """Pooling of D N proposals of an 800 x 1216 image (on a CPU 256 x 384), forward and backward."""
    height, width, channels = (800, 1216, 256) if device == "cuda" else (256, 384, 128)
    scales = (0.25, 0.125, 0.0625, 0.03125)
    features = [
        torch.randn(b, channels, round(height * s), round(width * s), device=device)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for s in scales
    ]
    centre = torch.rand(b, d * n, 2, device=device) * torch.tensor([width, height], device=device)
    side = torch.exp(torch.rand(b, d * n, 2, device=device) * 3) * height / 30
    boxes = torch.cat([centre - side / 2, centre + side / 2], -1)
    weight = torch.randn(b * d * n, channels, 7, 7, device=device)

    def gradients(pool: Callable) -> Pyramid:
        pooled = pool(features, boxes, scales, 7, 2, height / 3.5)
        return Pyramid(pooled.detach(), *torch.autograd.grad(pooled, features, weight))

    # Forward: four pixels a sample would be more than the floor, which reads the pyramid once.
    return Case(gradients, 4 * (2 * sum(f.numel() for f in features) + 2 * weight.numel()))


def dynamic_interaction(b: int, n: int, d: int, k: int, device: str) -> Case:
    """49 cells x 256 channels x 64 of D B N queries, forward and backward; bfloat16, on a CPU float32."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    queries, cells, channels, hidden = b * n * d, 49, 256, 64
    shapes = ((queries, cells, channels), (queries, channels, hidden), (queries, hidden, channels))
    tensors = [torch.randn(shape, device=device, dtype=dtype) / 8 for shape in shapes]
    tensors += [
        torch.ones(hidden, device=device, dtype=dtype),
        torch.zeros(hidden, device=device, dtype=dtype),
    ]
    tensors += [torch.ones(channels, device=device, dtype=dtype)]
    tensors += [torch.zeros(channels, device=device, dtype=dtype)]
    tensors = [x.requires_grad_() for x in tensors]
    weight = torch.randn(shapes[0], device=device, dtype=dtype)

    def gradients(interact: Callable) -> Interaction:
        mixed = interact(*tensors[:3], tuple(tensors[3:5]), tuple(tensors[5:]))
        return Interaction(mixed.detach(), *torch.autograd.grad(mixed, tensors[:3], weight))

    return Case(gradients, weight.element_size() * 2 * (2 * weight.numel() + 2 * tensors[1].numel()))


OPS = {
    "box_flow_update": box_flow_update,
    "flow_loss": flow_loss,
    "multilevel_roi_align": multilevel_roi_align,
    "dynamic_interaction": dynamic_interaction,
}
MODES = dict.fromkeys(("flow_loss", "multilevel_roi_align", "dynamic_interaction"), "forward and backward")


def rows_of(op: str, size: tuple[int, int, int, int], device: str) -> list[Row]:
    """Rows of one op at one size, after what will be timed has been compared with the reference."""
    case, mode = OPS[op](*size, device), MODES.get(op, "forward")
    torch._dynamo.reset()
    package, name = importlib.import_module(f"dfm_kernels.{op}"), "triton" if device == "cuda" else "auto"
    eager = getattr(package.reference, op)
    chosen = dfm_kernels.kernels(name)(getattr(package, op))
    functions = {"eager": eager, "compile": torch.compile(eager), name: chosen}
    providers = {name: partial(case.run, function) for name, function in functions.items()}
    expected = providers["eager"]()
    for name, run in providers.items():
        for field, a, b in zip(expected._fields, run(), expected):
            limit = {"rtol": 0, "atol": _TOLERANCE[op] * float(b.abs().max())}
            torch.testing.assert_close(a, b, **limit, msg=lambda m, f=field, n=name: f"{op} {n} {f}: {m}")
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


def draw(rows: list[Row], path: Path) -> None:
    """Time of every provider as a share of eager's, a panel an op."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times = {(r.op, r.x_value, r.provider): r.p50 for r in rows if r.metric == "time"}
    found = list(dict.fromkeys(op for op, _, _ in times))
    figure, axes = plt.subplots(len(found), 1, figsize=(8, 2.2 * len(found)), squeeze=False)
    for axis, op in zip(axes[:, 0], found):
        sizes = list(dict.fromkeys(size for name, size, _ in times if name == op))
        providers = list(dict.fromkeys(p for name, _, p in times if name == op))
        for index, provider in enumerate(providers):
            share = [times[op, size, provider] / times[op, size, "eager"] for size in sizes]
            where = [i + 0.8 * (index / len(providers) - 0.5) for i in range(len(sizes))]
            axis.bar(where, share, 0.8 / len(providers), align="edge", label=provider)
        axis.set_yscale("log")
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_title(f"{op}, {MODES.get(op, 'forward')}: time / eager", fontsize=9)
        axis.set_xticks(range(len(sizes)), sizes, fontsize=7)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(rows[0].device, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def ahead_of_time() -> int:
    """Compile everything that ships for every target and print it; the number of spilling kernels."""
    from dfm_kernels.ahead_of_time import TARGETS, compile_for, configurations, missing_targets

    missing = missing_targets()
    for target, reason in missing.items():
        print(f"{target} is left out: {reason}", file=sys.stderr)
    targets = [target for target in TARGETS if target not in missing]
    compiled = [compile_for(c, target) for c in configurations() for target in targets]
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
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/kernels_<device>.csv and .png"
    )
    args = parser.parse_args()
    if args.aot:
        return int(ahead_of_time() > 0)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: use --device cpu, or --aot")
    torch.manual_seed(0)
    rows = [row for op in args.ops for size in GRIDS[args.device] for row in rows_of(op, size, args.device)]
    if args.save:
        draw(rows, RESULTS / f"kernels_{args.device}.png")
        print(save_rows(f"kernels_{args.device}", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
