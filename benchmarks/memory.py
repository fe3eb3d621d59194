#!/usr/bin/env python
"""Memory and time of a training step against the number of predictors D (the paper's Figure 3).

python benchmarks/memory.py [--device cpu|cuda|simulate] [--decoders 1 2 4 8 12] [--save]
    --modes joint sequential sequential_step local cascade cascade_checkpoint parallel

The detector is that of --config (weights random, GroupNorm, nothing frozen, float32), its images and boxes
are random. Modes: "joint" (one backward of all local losses), "sequential" (block by block),
"sequential_step" (besides STEP_IN_BACKWARD), "local" (besides every stage of the backbone a block, with a
predictor of its own), "cascade" (end-to-end backprop), "cascade_checkpoint" (each of its heads recomputed in
the backward), "parallel" (all predictors as one batched computation, on a CPU too, where training would take
them one by one; not among the modes that run when none is named).

cpu, cuda: each point in a process of its own. "saved activations" is the peak of what autograd holds for the
backward, counted by saved-tensor hooks; "process peak" is the operating system's, "allocated" torch.cuda's.
simulate: a step on meta tensors under torch.distributed's MemTracker: every tensor's bytes over time and
nothing else (no rounding, of the CUDA allocator to 512 bytes a tensor; no workspace of cuDNN), at the peak of
their total. "activations" are all but the other kinds, temporaries too; "feature gradients" is what the
predictors add up in the features. ASSIGNMENT is "path", since dynamic_k looks at values; AdamW is not fused.
"""

import argparse
import contextlib
import csv
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from rows import Row, commit, device_name, quantiles, save_rows  # noqa: E402
from simulated_memory import MIB, simulate  # noqa: E402

import dfm_d2.registry  # noqa: E402, F401  (registers the meta-architectures)
from dfm_d2.config import add_dfm_config  # noqa: E402
from dfm_d2.detection.head import HeadAnswer  # noqa: E402
from dfm_d2.framework import Boxes, Instances, build_model, get_cfg  # noqa: E402
from dfm_d2.local_update import block_optimizer  # noqa: E402
from dfm_d2.local_update import updates as local_update  # noqa: E402
from dfm_d2.local_update.activations import SavedActivations  # noqa: E402

# mode: (meta-architecture, UPDATE, BACKBONE_UPDATE, STEP_IN_BACKWARD)
MODES = {
    "joint": ("FlowDetector", "joint", "accumulate", False),
    "sequential": ("FlowDetector", "sequential", "accumulate", False),
    "sequential_step": ("FlowDetector", "sequential", "accumulate", True),
    "local": ("FlowDetector", "sequential", "local", True),
    "cascade": ("CascadeDetector", "joint", "accumulate", False),
    "cascade_checkpoint": ("CascadeDetector", "joint", "accumulate", False),
    "parallel": ("FlowDetector", "parallel", "accumulate", False),
}
DEFAULT_MODES = [mode for mode in MODES if mode != "parallel"]
# Whose step is timed in turns with a joint one, where both are asked for.
IN_TURNS = ("sequential", "parallel")


def build(args: argparse.Namespace, mode: str, num_predictors: int) -> tuple:
    """Config, model, a batch of random images and the update strategy."""
    cfg = get_cfg()
    add_dfm_config(cfg)
    cfg.merge_from_file(args.config)
    meta_architecture, update, backbone_update, step_in_backward = MODES[mode]
    cfg.MODEL.META_ARCHITECTURE = meta_architecture
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", "", 0
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "GN"
    dfm = cfg.MODEL.DFM
    dfm.NUM_CLASSES, dfm.NUM_PREDICTORS, dfm.NUM_PROPOSALS = 20, num_predictors, args.proposals
    dfm.BACKBONE_UPDATE = backbone_update
    if args.device == "simulate":
        dfm.ASSIGNMENT = "path"
    torch.manual_seed(0)
    model = build_model(cfg).train()
    if mode == "cascade_checkpoint":
        for head in model.predictors:
            head.forward = _recomputed(head.forward)
    if mode == "parallel":
        model.all_losses_together = functools.partial(model.all_losses_together, batched=True)
    height, width = args.size
    batch = []
    for index in range(args.batch):
        instances = Instances((height, width))
        corners = torch.rand(8, 2) * torch.tensor([width * 0.7, height * 0.7])
        sides = torch.rand(8, 2) * torch.tensor([width * 0.2, height * 0.2]) + 8
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], 1))
        instances.gt_classes = torch.arange(8)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "image_id": str(index)})
    return cfg, model, batch, local_update.build_update(update, backbone_update, step_in_backward)


def _recomputed(forward: Callable) -> Callable:
    """A head's forward under activation checkpointing."""

    def flat(boxes_xyxy, x_t, t, queries, *features):
        return forward(features, boxes_xyxy, x_t, t, queries)

    def recomputed(features, boxes_xyxy, x_t, t, queries=None):
        # Reentrant, so that what is saved passes the hooks that count it.
        return HeadAnswer(*checkpoint(flat, boxes_xyxy, x_t, t, queries, *features, use_reentrant=True))

    return recomputed


def point(args: argparse.Namespace, mode: str, num_predictors: int) -> dict[str, list[float]]:
    """Measurements at one D, MiB and ms, each a list of repetitions."""
    cfg, model, batch, update = build(args, mode, num_predictors)
    if args.device == "simulate":
        return {name: [value] for name, value in simulate(model, batch, update).items()}
    model = model.to(args.device)
    optimizer = block_optimizer.build_block_optimizer(cfg, model)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, saved = [], 0
    for iteration in range(args.repeats + 1):
        prepared = model.prepare(batch, iteration)
        synchronize(args.device)
        begun = time.perf_counter()
        if iteration == 0:
            with SavedActivations(model.parameters()) as activations:
                update.step(model, prepared, optimizer, contextlib.nullcontext)
            saved = activations.peak
        else:
            update.step(model, prepared, optimizer, contextlib.nullcontext)
            synchronize(args.device)
            times.append(1000 * (time.perf_counter() - begun))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    state = sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values())
    found = {
        "saved activations": [saved / MIB],
        "parameters": [parameters / MIB],
        "optimizer state": [state / MIB],
        "step": times,
    }
    if args.device == "cuda":
        found["allocated"] = [torch.cuda.max_memory_allocated() / MIB]
    else:
        found["process peak"] = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]
    return found


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_ratio(args: argparse.Namespace, other: str, num_predictors: int) -> float:
    """Time of a step of another mode over that of a joint one, taken in turns in one process."""
    times: dict[str, list[float]] = {"joint": [], other: []}
    runs = {}
    for mode in times:
        cfg, model, batch, update = build(args, mode, num_predictors)
        model = model.to(args.device)
        runs[mode] = model, batch, update, block_optimizer.build_block_optimizer(cfg, model)
    for iteration in range(args.repeats + 2):
        for mode, (model, batch, update, optimizer) in runs.items():
            prepared = model.prepare(batch, iteration)
            synchronize(args.device)
            begun = time.perf_counter()
            update.step(model, prepared, optimizer, contextlib.nullcontext)
            synchronize(args.device)
            if iteration > 1:
                times[mode].append(time.perf_counter() - begun)
    return quantiles(times[other])[1] / quantiles(times["joint"])[1]


def draw(rows: Path, metric: str, setting: str, path: Path) -> None:
    """`metric` against D, one line a mode: of the rows of this call, and of those that were there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: dict[str, dict[int, float]] = {}
    with rows.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["metric"], row["note"]) == (metric, setting) and row["provider"] in DEFAULT_MODES:
                found.setdefault(row["provider"], {})[int(row["x_value"])] = float(row["p50"])
                title = f"{setting}, {row['device']}"
    figure, axis = plt.subplots(figsize=(5.5, 3.8))
    # Thick lines below thin ones: some coincide.
    for width, (mode, points) in zip((6, 5, 4, 3, 2, 1.5, 1), found.items()):
        counts = sorted(points)
        values = [points[count] for count in counts]
        axis.plot(counts, values, marker="o", markersize=width, linewidth=width / 1.5, label=mode)
    axis.set_xlabel("predictors D")
    axis.set_ylabel(f"{metric} (MiB)")
    axis.set_ylim(bottom=0)
    axis.set_title(title, fontsize=8)
    axis.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", choices=("cpu", "cuda", "simulate"), default="cpu")
    parser.add_argument("--config", default=str(ROOT / "configs" / "voc_flow_r50.yaml"))
    parser.add_argument("--decoders", type=int, nargs="+", default=[1, 2, 4, 8, 12])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=DEFAULT_MODES)
    parser.add_argument("--batch", type=int, help="1 on a CPU, else 8 (the paper's)")
    parser.add_argument("--proposals", type=int, help="100 on a CPU, else 300")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="224 320, else 800 1088"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/memory_<device>.csv and .png"
    )
    parser.add_argument("--name", default="", help="of these files, in the place of memory_<device>")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    small = args.device == "cpu"
    args.batch = args.batch or (1 if small else 8)
    args.proposals = args.proposals or (100 if small else 300)
    args.size = args.size or ((224, 320) if small else (800, 1088))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: use --device cpu or simulate")
    if min(args.decoders) < 1:
        parser.error(f"--decoders must be positive, got {args.decoders}")
    if args.child:
        mode, count = args.child
        _, _, other = mode.partition("/")
        measured = time_ratio(args, other, int(count)) if other else point(args, mode, int(count))
        print(json.dumps(measured))
        return
    report(args)


def child(args: argparse.Namespace, mode: str, num_predictors: int):
    """What a process of its own measures."""
    command = [sys.executable, __file__, "--device", args.device, "--config", args.config]
    command += [
        "--batch",
        str(args.batch),
        "--proposals",
        str(args.proposals),
        "--repeats",
        str(args.repeats),
    ]
    command += ["--size", *map(str, args.size), "--child", mode, str(num_predictors)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{mode} at D={num_predictors} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(args: argparse.Namespace) -> None:
    """Measure all points, print rows and the last line."""
    setting = f"{Path(args.config).stem} B={args.batch} N={args.proposals} {args.size[0]}x{args.size[1]}"
    hardware = "simulated" if args.device == "simulate" else device_name(args.device)
    counts = sorted(set(args.decoders))
    found: dict[str, dict[int, dict]] = {mode: {} for mode in args.modes}
    rows = []
    for mode in args.modes:
        for count in counts:
            found[mode][count] = measured = child(args, mode, count)
            for metric, values in measured.items():
                unit = "ms" if metric == "step" else "MiB"
                rows.append(
                    Row("training step", mode, args.device, metric, unit, "D", str(count), *quantiles(values),
                        hardware, torch.__version__, commit(), setting)
                )  # fmt: skip
            gist = ", ".join(f"{name} {quantiles(values)[1]:.1f}" for name, values in measured.items())
            print(f"{mode:18s} D={count:<3d} {gist}", flush=True)
    activations = "activations" if args.device == "simulate" else "saved activations"
    for mode in IN_TURNS:
        if args.device == "simulate" or not {"joint", mode} <= set(args.modes):
            continue
        ratio = child(args, f"joint/{mode}", 6)
        rows.append(
            Row("training step", f"{mode}/joint", args.device, "step, in turns", "ratio", "D", "6",
                *[ratio] * 3, hardware, torch.__version__, commit(), setting)
        )  # fmt: skip
        print(f"step time {mode}/joint, in turns, D=6: {ratio:.3f}")
    if args.save:
        path = save_rows(args.name or f"memory_{args.device}", rows)
        if len(counts) > 1:
            draw(path, activations, setting, path.with_suffix(".png"))
            print(path.with_suffix(".png"))
    if {"joint", "sequential"} <= set(args.modes) and len(counts) > 1:
        first, last = counts[0], counts[-1]
        growth = {
            mode: found[mode][last][activations][0] - found[mode][first][activations][0]
            for mode in ("joint", "sequential")
        }
        per_predictor = {mode: value / (last - first) for mode, value in growth.items()}
        print(
            f"activations a predictor: joint {per_predictor['joint']:.2f} MiB, "
            f"sequential {per_predictor['sequential']:.2f} MiB"
        )
        print(f"activation growth sequential/joint: {growth['sequential'] / growth['joint']:.4f}")


if __name__ == "__main__":
    main()
