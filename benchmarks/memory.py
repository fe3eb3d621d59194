#!/usr/bin/env python
"""Memory and time of a training step against the number of blocks (the paper's Figure 3).

python benchmarks/memory.py [detector|demo|classifier] [--device cpu|cuda|simulate] [--counts 1 2 4] [--save]
    --modes joint sequential sequential_step local_backbone cascade cascade_checkpoint parallel ...
    --modes "flow, sequential" "flow, joint" backprop      of the classifier

detector: R50-FPN against its predictors. Weights random, GroupNorm, nothing frozen, float32, images and boxes
random; batch 1 of 224 x 320 and 100 proposals on a CPU, else the paper's 8 of 800 x 1088 and 300 proposals.
Modes: "joint" (one backward of all local losses), "sequential" (block by block), "sequential_step" (besides
STEP_IN_BACKWARD), "local_backbone" (besides every backbone stage a block, with a predictor of its own),
"cascade" (end-to-end backprop), "cascade_checkpoint" (each of its heads recomputed in the backward).
Modes that run only when they are named: "parallel" (all predictors as one batched computation, on a CPU too,
where training would take them one by one), "cascade_checkpoint_all" (the residual blocks of the backbone
recomputed, too), and with "_accumulate" behind "sequential", "local_backbone", "cascade" and
"cascade_checkpoint_all" gradient accumulation: the batch as micro-batches of one image, see Accumulation.
demo: the detector of configs/shapes_flow_r18.yaml and its batch, 8 images of 128 x 128 (float32, random),
local updates beside backprop with checkpointing and accumulation.
classifier: a ViT against its layers, each a block, by local flow and by backprop.

cpu, cuda: each point in a process of its own. "saved activations" is the peak of what autograd holds for the
backward, counted by saved-tensor hooks; "process peak" is the operating system's, "allocated" torch.cuda's.
simulate: a step of the detector on tensors without data, see simulated_step.py. ASSIGNMENT is "path", since
dynamic_k looks at values.

Rows "<mode>/cascade" are ratios to "cascade", where that is among the modes. Times to compare are those of
steps taken in turns in one process: ratios to "cascade" for the demo, to "joint" at D = 6 for the detector.
"""

import argparse
import contextlib
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import harness
import torch
from harness import MIB, ROOT, Row
from simulated_step import mib_of, simulate
from torch.utils.checkpoint import checkpoint

from dfm_d2.classification.task import CLASSIFICATION
from dfm_d2.detection.head import HeadAnswer
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.engine.setup import load_config
from dfm_d2.errors import exit_status
from dfm_d2.framework import Boxes, Instances
from dfm_d2.local_update import updates
from dfm_d2.local_update.activations import SavedActivations

_CASCADE = ["MODEL.META_ARCHITECTURE", "CascadeDetector", "MODEL.DFM.UPDATE", "joint"]
_SEQUENTIAL = ["MODEL.DFM.UPDATE", "sequential"]
_STEP = [*_SEQUENTIAL, "MODEL.DFM.STEP_IN_BACKWARD", "True"]
_LOCAL_BACKBONE = ["MODEL.DFM.BACKBONE_UPDATE", "local"]
# Of the detector: overrides of the config.
DETECTOR = {
    "joint": ["MODEL.DFM.UPDATE", "joint"],
    "sequential": _SEQUENTIAL,
    "sequential_step": _STEP,
    "local_backbone": [*_STEP, *_LOCAL_BACKBONE],
    "cascade": _CASCADE,
    "cascade_checkpoint": _CASCADE,
    "parallel": ["MODEL.DFM.UPDATE", "parallel"],
    "cascade_checkpoint_all": _CASCADE,
    "cascade_accumulate": _CASCADE,
    "cascade_checkpoint_all_accumulate": _CASCADE,
    "sequential_accumulate": _SEQUENTIAL,
    "local_backbone_accumulate": [*_SEQUENTIAL, *_LOCAL_BACKBONE],
}
CLASSIFIER = {
    "flow, sequential": ["UPDATE.METHOD", "flow", "MODEL.DFM.UPDATE", "sequential"],
    "flow, joint": ["UPDATE.METHOD", "flow", "MODEL.DFM.UPDATE", "joint"],
    "backprop": ["UPDATE.METHOD", "backprop", "MODEL.DFM.UPDATE", "joint"],
}
# Those that run where none is named.
USUAL = list(DETECTOR)[:6]
# Which steps are timed in turns, those of them that are asked for; the others are compared with the first.
IN_TURNS = {
    "detector": ("joint", "sequential", "parallel"),
    "demo": ("cascade", *(mode for mode in DETECTOR if mode not in ("joint", "cascade", "parallel"))),
}
# What has rows of ratios to "cascade".
_PEAKS = ("activations", "total", "saved activations", "process peak", "allocated")
_CLASSIFIER_DIM, _CLASSIFIER_BATCH = 128, 16


def detector_setting(subject: str, device: str) -> tuple[str, int, int, int, int]:
    """Name of the config, images, proposals, height and width."""
    if subject == "demo":
        return "shapes_flow_r18", 8, 40, 128, 128
    return ("voc_flow_r50", 1, 100, 224, 320) if device == "cpu" else ("voc_flow_r50", 8, 300, 800, 1088)


def detector(subject: str, device: str, mode: str, count: int) -> tuple:
    """Config, model and a batch of random images."""
    name, number, proposals, height, width = detector_setting(subject, device)
    opts = [*DETECTOR[mode], "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", 0]
    opts += ["MODEL.DFM.NUM_CLASSES", 20, "MODEL.DFM.NUM_PREDICTORS", count]
    opts += ["MODEL.DFM.NUM_PROPOSALS", proposals]
    if subject == "detector":
        opts += ["MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN"]
    if device == "simulate":
        opts += ["MODEL.DFM.ASSIGNMENT", "path"]
    cfg, model = harness.random_detector(str(ROOT / "configs" / f"{name}.yaml"), opts)
    if "checkpoint" in mode:
        for head in model.predictors:
            head.forward = _recomputed(head.forward)
    if "checkpoint_all" in mode:
        bottom_up = model.backbone.bottom_up
        for block in (block for stage in bottom_up.output_shape() for block in getattr(bottom_up, stage)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=True)
    batch = []
    for index in range(number):
        instances = Instances((height, width))
        corners = torch.rand(8, 2) * torch.tensor([width * 0.7, height * 0.7])
        sides = torch.rand(8, 2) * torch.tensor([width * 0.2, height * 0.2]) + 8
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], 1))
        instances.gt_classes = torch.arange(8)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "image_id": str(index)})
    return cfg, model, batch


def classifier(mode: str, count: int) -> tuple:
    """The same of a ViT of `count` layers, each a block."""
    vit = f'"img_size=32","patch_size=4","embed_dim={_CLASSIFIER_DIM}","depth={count}","num_heads=4"'
    opts = [*CLASSIFIER[mode], "MODEL.CLASSIFIER.BLOCKS", "0", "MODEL.TIMM.OPTIONS", f"[{vit}]"]
    opts += ["MODEL.DFM.NUM_CLASSES", "10", "MODEL.DEVICE", "cpu"]
    cfg = load_config(CLASSIFICATION, str(ROOT / "configs" / "cifar10_flow_vit.yaml"), opts)
    torch.manual_seed(0)
    model = CLASSIFICATION.build_model(cfg)
    images = torch.randint(0, 256, (_CLASSIFIER_BATCH, 3, 32, 32), dtype=torch.uint8)
    return cfg, model, [{"image_id": str(i), "label": i % 10, "image": x} for i, x in enumerate(images)]


def _recomputed(forward: Callable) -> Callable:
    """A head's forward under activation checkpointing."""

    def flat(boxes_xyxy, x_t, t, queries, *features):
        return forward(features, boxes_xyxy, x_t, t, queries)

    def recomputed(features, boxes_xyxy, x_t, t, queries=None):
        # Reentrant, so that what is saved passes the hooks that count it.
        return HeadAnswer(*checkpoint(flat, boxes_xyxy, x_t, t, queries, *features, use_reentrant=True))

    return recomputed


class Accumulation(updates.Update):
    """Gradient accumulation: one step by the mean of the gradients of micro-batches, one after the other.

    As a user would do it, each loss is divided by their number, here its gradient: each is normalised by
    its own queries with an object, not by those of the batch, and batch norm takes the statistics of each by
    itself (its running ones move with each). Frozen batch norm and GroupNorm are those of the whole batch.
    """

    def __init__(self, update: updates.Update):
        self.update = update

    def backward(self, model, prepared, optimizer, autocast) -> dict[str, torch.Tensor]:
        """prepared: those of the micro-batches."""
        found = [self.update.backward(model, one, optimizer, autocast) for one in prepared]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_div_(gradients, len(found))
        return {key: torch.stack([metrics[key] for metrics in found]).mean() for key in found[0]}


class Training:
    """Steps of one mode at one number of blocks: what is called takes one."""

    def __init__(self, args: argparse.Namespace, mode: str, count: int):
        if args.subject == "classifier":
            cfg, self.model, self.batch = classifier(mode, count)
        else:
            cfg, self.model, self.batch = detector(args.subject, args.device, mode, count)
        self.model.train()
        self.update = updates.build_update(cfg.MODEL.DFM.UPDATE, cfg.MODEL.DFM.STEP_IN_BACKWARD)
        if mode == "parallel":
            self.update.together = True  # on a CPU, too
        self.accumulates = mode.endswith("_accumulate")
        if self.accumulates:
            self.update = Accumulation(self.update)
        self.iteration = 0
        if args.device != "simulate":
            self.optimizer = build_block_optimizer(cfg, self.model.to(args.device))

    def __call__(self) -> None:
        self.update.step(self.model, self.prepared(), self.optimizer, contextlib.nullcontext)
        self.iteration += 1

    def prepared(self):
        """What the update takes: the batch, or its micro-batches, each made when it is asked for."""
        if self.accumulates:
            return (self.model.prepare([item], self.iteration) for item in self.batch)
        return self.model.prepare(self.batch, self.iteration)


def point(args: argparse.Namespace, mode: str, count: int) -> dict[str, list[float]]:
    """Measurements of one mode at one number of blocks, MiB and ms, each a list of repetitions."""
    training = Training(args, mode, count)
    if args.device == "simulate":
        simulated = simulate(training.model, training.update, training.prepared(), training.accumulates)
        return {name: [value] for name, value in simulated.items()}
    parameters = list(training.model.parameters())
    with SavedActivations(parameters) as saved:
        training()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    repeats = 1 if args.subject == "demo" else args.repeats  # all steps of the demo are timed in turns
    times = [harness.timed(training, args.device) for _ in range(repeats)]
    state = [x for s in training.optimizer.state.values() for x in s.values()]
    found = {
        "saved activations": [saved.peak / MIB],
        "parameters": [mib_of(parameters)],
        "optimizer state": [mib_of(state)],
        "step": times,
    }
    if args.device == "cuda":
        return found | {"allocated": [torch.cuda.max_memory_allocated() / MIB]}
    return found | {"process peak": [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]}


def times_in_turns(args: argparse.Namespace, modes: Sequence[str], count: int) -> dict[str, list[float]]:
    """Milliseconds of a step of each mode, taken in turns in one process."""
    trainings = {name: Training(args, name, count) for name in modes}
    return harness.in_turns(trainings, args.device, args.repeats)


def usual_of(args: argparse.Namespace) -> dict[str, object]:
    """What stands for what the command line leaves out."""
    if args.subject == "classifier":
        return {"counts": [4, 8, 16], "modes": list(CLASSIFIER), "name": "class_memory"}
    if args.subject == "demo":
        return {"counts": [4], "modes": list(IN_TURNS["demo"]), "name": "memory_demo"}
    return {"counts": [1, 2, 4, 8, 12], "modes": USUAL, "name": "memory"}


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """Measure all points, each in a process of its own."""
    if args.subject == "classifier":
        op, x_name = "classifier step", "blocks"
        setting = f"ViT, {_CLASSIFIER_DIM} dimensions, 64 tokens, batch {_CLASSIFIER_BATCH}"
    else:
        op, x_name = "training step", "D"
        setting = "{} B={} N={} {}x{}".format(*detector_setting(args.subject, args.device))
    hardware = "simulated" if args.device == "simulate" else harness.device_name(args.device)

    def row(provider: str, metric: str, unit: str, count: int, values: list[float]) -> Row:
        where = (op, provider, args.device, metric, unit, x_name, count)
        return harness.measured(*where, values=values, on=hardware, note=setting)

    peaks = {}
    for mode in args.modes:
        for count in sorted(set(args.counts)):
            for metric, values in harness.alone(point, args, mode, count).items():
                yield row(mode, metric, "ms" if metric == "step" else "MiB", count, values)
                peaks[mode, count, metric] = statistics.median(values)
    for (mode, count, metric), peak in peaks.items():
        backprop = peaks.get(("cascade", count, metric))
        if backprop and mode != "cascade" and metric in _PEAKS:
            yield row(f"{mode}/cascade", f"{metric}, ratio", "ratio", count, [peak / backprop])
    reference, *others = IN_TURNS.get(args.subject, ("",))
    others = [mode for mode in others if mode in args.modes]
    if args.device == "simulate" or reference not in args.modes or not others:
        return
    count = 6 if args.subject == "detector" else max(args.counts)
    times = harness.alone(times_in_turns, args, [reference, *others], count)
    for mode in others:
        ratios = [a / b for a, b in zip(times[mode], times[reference])]
        yield row(f"{mode}/{reference}", "step, in turns", "ratio", count, ratios)


def print_growth(rows: list[Row], metric: str) -> None:
    """Of joint and sequential updates of the detector, what a predictor adds."""
    growth, lines = {}, harness.lines_of(row for row in rows if row.metric == metric)
    for mode in ("joint", "sequential"):
        points = lines.get(mode, [])
        if len(points) < 2:
            return
        (first, _, before, _), (last, _, after, _) = points[0], points[-1]
        growth[mode] = (after - before) / (last - first)
    said = ", ".join(f"{mode} {value:.2f} MiB" for mode, value in growth.items())
    print(f"activations a predictor: {said}")
    print(f"activation growth sequential/joint: {growth['sequential'] / growth['joint']:.4f}")


def main() -> None:
    parser = harness.arguments(__doc__, "simulate")
    parser.add_argument("subject", nargs="?", choices=("detector", "demo", "classifier"), default="detector")
    parser.add_argument("--counts", type=int, nargs="+", help="1 2 4 8 12, of the classifier 4 8 16")
    parser.add_argument("--modes", nargs="+", choices=[*DETECTOR, *CLASSIFIER])
    parser.add_argument("--repeats", type=int, default=5)
    args = harness.parsed(parser, usual_of)
    if args.device == "simulate" and args.subject == "classifier":
        parser.error("a classifier cannot be simulated: use --device cpu or cuda")
    rows = harness.reported(rows_of(args), args.save and args.name)
    metric = "activations" if args.device == "simulate" else "saved activations"
    if args.save and len(set(args.counts)) > 1:
        last = rows[-1]  # with the file's rows of its setting
        known = [row for row in harness.load_rows(args.name) if (row.metric, row.note) == (metric, last.note)]
        lines = harness.lines_of(row for row in known if row.provider not in set(DETECTOR) - set(USUAL))
        panels = {last.note: (f"blocks ({last.x_name})", lines)}
        path = harness.RESULTS / f"{args.name}.png"
        print(harness.draw_panels(path, last.device, f"{metric} (MiB)", panels))
    print_growth(rows, metric)


if __name__ == "__main__":
    sys.exit(exit_status(main))
