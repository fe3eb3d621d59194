#!/usr/bin/env python
"""Microbenchmarks of the ops of dfm_kernels, and their compilation without a GPU.

python benchmarks/kernels.py --aot                 registers, spills and shared memory of what ships
python benchmarks/kernels.py --device cuda --save  eager, torch.compile and Triton against the bytes' floor
python benchmarks/kernels.py --device cpu          the same without Triton (which has no CPU backend)
    --ops box_flow_update    only these ops

multilevel_roi_align is timed beside a loop over levels of torchvision's operator, too.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import harness  # noqa: F401  (finds dfm_kernels in a checkout)
import torch
from dfm_kernels import kernels
from dfm_kernels.multilevel_roi_align.reference import assign_levels
from harness import Row, arguments, device_name, launches, measured, parsed, peak_mib, repeated, reported
from torch import Tensor
from torchvision.ops import roi_align

from dfm_d2.errors import exit_status

# (B, N, D, K): VOC and COCO inference, shared time, LVIS' classes, a training batch; and what a CPU can do.
GRIDS = {
    "cuda": ((1, 300, 1, 20), (1, 300, 6, 20), (8, 300, 6, 80), (16, 500, 6, 80), (16, 500, 1, 1203)),
    "cpu": ((1, 100, 1, 20), (1, 300, 6, 20), (4, 100, 1, 80)),
}


# An op at one size: what calls it, or its reference, on the inputs; the bytes read and written at least.
Case = tuple[Callable[[Callable], tuple], int]


def box_flow_update(b: int, n: int, d: int, k: int, device: str) -> Case:
    """Inference's step; answers and logits in float32."""
    x_t = torch.randn(b, n, 4, device=device)
    answers, logits = torch.randn(d, b, n, 4, device=device), torch.randn(d, b, n, k, device=device)
    t, t_next = torch.full((b,), 0.25, device=device), torch.full((b,), 0.5, device=device)
    sizes = torch.tensor([[480.0, 640.0]], device=device).repeat(b, 1)
    arguments = (x_t, answers, logits, t, t_next, sizes)
    options = {"signal_scale": 2.0, "box_weights": (2.0, 2.0, 1.0, 1.0)}
    num_bytes = 4 * (answers.numel() + logits.numel() + 5 * x_t.numel() + b * n * k)
    return lambda update: update(*arguments, **options), num_bytes


def flow_loss(b: int, n: int, d: int, k: int, device: str) -> Case:
    """Training's loss of one predictor, forward and backward, logits in float32; D does not enter."""
    logits = torch.randn(b, n, k, device=device, requires_grad=True)
    x_1_hat = torch.randn(b, n, 4, device=device, requires_grad=True)
    target = torch.randn(b, n, 4, device=device)
    classes = torch.randint(0, k + 1, (b, n), device=device)
    t, normalizer = torch.rand(b, device=device), torch.tensor(float(b * n), device=device)
    options = {"signal_scale": 2.0, "gamma": 2.0, "velocity_max": 25.0}

    def gradients(loss: Callable) -> tuple[Tensor, ...]:
        terms = loss(logits, x_1_hat, classes, target, t, normalizer, **options)
        return torch.autograd.grad(sum(terms), (logits, x_1_hat))

    return gradients, 4 * (2 * logits.numel() + 3 * x_1_hat.numel() + 2 * classes.numel())


def multilevel_roi_align(b: int, n: int, d: int, k: int, device: str) -> Case:
    """Pooling of D N proposals of an 800 x 1216 image (on a CPU 256 x 384), forward and backward."""
    height, width, channels = (800, 1216, 256) if device == "cuda" else (256, 384, 128)
    scales = (0.25, 0.125, 0.0625, 0.03125)
    sides = [(round(height * s), round(width * s)) for s in scales]
    features = [torch.randn(b, channels, *side, device=device) for side in sides]
    features = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in features]
    centre = torch.rand(b, d * n, 2, device=device) * torch.tensor([width, height], device=device)
    side = torch.exp(torch.rand(b, d * n, 2, device=device) * 3) * height / 30
    boxes = torch.cat([centre - side / 2, centre + side / 2], -1)
    weight = torch.randn(b * d * n, channels, 7, 7, device=device)

    def gradients(pool: Callable) -> tuple[Tensor, ...]:
        pooled = pool(features, boxes, scales, 7, 2, height / 3.5)
        return pooled.detach(), *torch.autograd.grad(pooled, features, weight)

    # Forward: four pixels a sample would be more than the floor, which reads the pyramid once.
    return gradients, 4 * (2 * sum(f.numel() for f in features) + 2 * weight.numel())


def dynamic_interaction(b: int, n: int, d: int, k: int, device: str) -> Case:
    """49 cells x 256 channels x 64 of D B N queries, forward and backward; bfloat16, on a CPU float32."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    queries, cells, channels, hidden = b * n * d, 49, 256, 64
    shapes = ((queries, cells, channels), (queries, channels, hidden), (queries, hidden, channels))
    tensors = [torch.randn(shape, device=device, dtype=dtype) / 8 for shape in shapes]
    for size in (hidden, channels):  # of the two LayerNorms
        tensors += [make(size, device=device, dtype=dtype) for make in (torch.ones, torch.zeros)]
    tensors = [x.requires_grad_() for x in tensors]
    weight = torch.randn(shapes[0], device=device, dtype=dtype)

    def gradients(interact: Callable) -> tuple[Tensor, ...]:
        mixed = interact(*tensors[:3], tuple(tensors[3:5]), tuple(tensors[5:]))
        return mixed.detach(), *torch.autograd.grad(mixed, tensors[:3], weight)

    return gradients, weight.element_size() * 2 * (2 * weight.numel() + 2 * tensors[1].numel())


def torchvision_roi_align(
    features: Sequence[Tensor], boxes_xyxy: Tensor, scales, output_size: int, samples: int, canonical: float
) -> Tensor:
    """What a pooler on torchvision's operator does: one call a level, rows put back in order."""
    flat = boxes_xyxy.flatten(0, 1)
    image = torch.arange(len(boxes_xyxy), device=flat.device).repeat_interleave(boxes_xyxy.shape[1])
    rois = torch.cat([image[:, None], flat], dim=1)
    level = assign_levels(flat, len(features), 2, canonical)
    out = features[0].new_zeros(len(rois), features[0].shape[1], output_size, output_size)
    for index, (feature, scale) in enumerate(zip(features, scales)):
        rows = torch.nonzero(level == index).squeeze(1)
        pooled = roi_align(feature, rois[rows], output_size, scale, samples, aligned=True)
        out = out.index_put((rows,), pooled)
    return out


# The case of each op, and how far its answers may be from the reference's, relative to the largest element:
# TF32 and bfloat16 keep 11 and 8 bits, and sums of 256 of them fewer.
OPS = {
    "box_flow_update": (box_flow_update, 1e-5),
    "flow_loss": (flow_loss, 1e-5),
    "multilevel_roi_align": (multilevel_roi_align, 1e-4),
    "dynamic_interaction": (dynamic_interaction, 5e-2),
}


def providers(op: str, device: str) -> dict[str, Callable]:
    """Implementations of an op; the first is what the others are compared with."""
    eager, chosen = (
        getattr(importlib.import_module(f"dfm_kernels.{op}.{place}"), op) for place in ("reference", "op")
    )
    backend = "triton" if device == "cuda" else "auto"

    def on_backend(*arguments, **options):
        with kernels(backend):
            return chosen(*arguments, **options)

    found = {"eager": eager, "compile": torch.compile(eager), backend: on_backend}
    if op == "multilevel_roi_align":
        found["torchvision"] = torchvision_roi_align
    return found


def rows_of(op: str, size: tuple[int, int, int, int], device: str) -> Iterator[Row]:
    """Rows of one op at one size, after what will be timed has been compared with the reference."""
    torch._dynamo.reset()
    (make_case, tolerance), mode = OPS[op], "forward" if op == "box_flow_update" else "forward and backward"
    call, num_bytes = make_case(*size, device)
    runs = {name: partial(call, function) for name, function in providers(op, device).items()}
    expected = runs["eager"]()
    for name, run in runs.items():
        for place, (a, b) in enumerate(zip(run(), expected, strict=True)):
            limit = {"rtol": 0, "atol": tolerance * float(b.abs().max())}
            torch.testing.assert_close(a, b, **limit, msg=lambda m, at=f"{op} {name} {place}": f"{at}: {m}")
    label = "B={} N={} D={} K={}".format(*size)

    def row(name: str, metric: str, unit: str, values: list[float]) -> Row:
        return measured(op, name, mode, metric, unit, "size", label, values=values, on=device_name(device))

    source = torch.empty(num_bytes // 2 // 4, device=device)  # a clone reads and writes
    clone = row("clone of as many bytes", "time", "ms", repeated(source.clone, device))
    yield clone
    for name, run in runs.items():
        time = row(name, "time", "ms", repeated(run, device))
        yield time
        if device == "cuda":
            yield row(name, "share of a clone's bandwidth", "%", [100 * clone.p50 / time.p50])
            yield row(name, "launches", "", [float(launches(run))])
            yield row(name, "peak memory", "MiB", [peak_mib(run)])


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
    parser = arguments(__doc__)
    parser.add_argument("--aot", action="store_true", help="compile without a GPU, measure nothing")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    args = parsed(parser, lambda _: {"name": "kernels"})
    if args.aot:
        return int(ahead_of_time() > 0)
    torch.manual_seed(0)
    sizes = ((op, size) for op in args.ops for size in GRIDS[args.device])
    rows = (row for op, size in sizes for row in rows_of(op, size, args.device))
    reported(rows, args.save and args.name)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
