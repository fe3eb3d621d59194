#!/usr/bin/env python
"""Seconds that a user waits: for detections, for the sampler alone, for an exported file, for a command.

python benchmarks/latency.py [detector|sampler|formats|start] [--device cpu|cuda] [--config FILE] [--save]
    --proposals 100 300 --batches 1 8 --size 352 480 --repeats 5
    --precision high|highest    of float32 products; the dynamic convolution's kernel needs "high" (TF32)

detector: pixels to Instances over steps, beside the cascade twin (one pass of its D heads) at equal N.
sampler: K steps of the heads on given features: plain torch, kernels, one CUDA graph.
formats: every export format: whether it is equal to the model, its size and its latency for one image, on the
CPU and the framework that DFM_FRAMEWORK chooses. --images a.jpg b.jpg: photographs to compare on; none: three
generated images of three sizes.
start: of tools/train_net.py --help, and of the error message for a wrong key and for a missing file.

Weights are random unless --opts MODEL.WEIGHTS gives some (formats only): the time does not depend on them,
but for what NMS has to look at. Ratios are those of turns.
"""

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import harness
import torch
from dfm_kernels import kernels
from harness import ROOT, Row, measured, random_detector

from dfm_d2.detection.data.loader import read_test_item
from dfm_d2.detection.exportable import ExportedDetector, export_detector, prepared_model
from dfm_d2.detection.loading import load_detector
from dfm_d2.detection.sampler import Candidates
from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.setup import load_config
from dfm_d2.errors import exit_status
from dfm_d2.framework import PROVIDER


def random_images(count: int, size: tuple[int, int], device: str) -> list[dict]:
    """Inputs of a detector."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8).to(device)
    return [{"image": image, "image_id": i} for i, image in enumerate(images)]


def detector_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Latency of the detector and of its twin, in turns."""
    variants = {f"flow K={k}": ["MODEL.DFM.SAMPLER.STEPS", k] for k in args.steps}
    variants["cascade"] = ["MODEL.META_ARCHITECTURE", "CascadeDetector", "MODEL.DFM.SAMPLER.STEPS", 1]
    note = f"{Path(args.config).stem}, float32 {args.precision}, in turns"
    for proposals, batch in itertools.product(args.proposals, args.batches):
        inputs = random_images(batch, args.size, args.device)
        opts = ["MODEL.DEVICE", args.device, "MODEL.DFM.SAMPLER.NUM_PROPOSALS", proposals, *args.opts]
        models = {name: random_detector(args.config, opts + more)[1] for name, more in variants.items()}
        with torch.no_grad():
            runs = {name: partial(model, inputs) for name, model in models.items()}
            times = harness.in_turns(runs, args.device, args.repeats)
        label, heads = f"N={proposals} B={batch}", models["cascade"].num_predictors
        tail = ("size", f"{label} {args.size[0]}x{args.size[1]}")
        for name, values in times.items():
            where = (f"detector {label}", name, f"D={heads}")
            ratios = [mine / theirs for mine, theirs in zip(values, times["cascade"])]
            for metric, unit, found in (("latency", "ms", values), ("latency / cascade", "", ratios)):
                on = harness.device_name(args.device)
                yield measured(*where, metric, unit, *tail, values=found, on=on, note=note)


def _sampled(model: torch.nn.Module, features: list[torch.Tensor], sizes: torch.Tensor) -> Candidates:
    x_0 = model.sampler.noise(list(range(len(sizes))), sizes.device)
    return model.sampler.sample(model._step_function, features, sizes, x_0, model._graph_owner())


def sampler_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Time of the sampler of a chain (K head evaluations) and of an ensemble (D K of them)."""
    providers = [("torch", "torch", 0), ("auto", "auto", 0)]
    providers += [("auto, CUDA graph", "auto", 1)] * (args.device == "cuda")
    grid = itertools.product(args.steps, args.proposals, args.batches, ("chain", "ensemble"))
    for steps, proposals, batch, predictors in grid:
        opts = ["MODEL.DEVICE", args.device, "MODEL.DFM.SAMPLER.NUM_PROPOSALS", proposals, *args.opts]
        opts += ["MODEL.DFM.SAMPLER.STEPS", steps, "MODEL.DFM.INTERVALS", int(predictors == "ensemble")]
        cfg, model = random_detector(args.config, opts)
        features = []
        for shape in (model.backbone.output_shape()[name] for name in model.in_features):
            sides = [-(-side // shape.stride) for side in args.size]
            feature = torch.randn(batch, shape.channels, *sides, device=args.device)
            features.append(feature.contiguous(memory_format=torch.channels_last))
        sizes = torch.tensor([args.size] * batch, dtype=torch.float32, device=args.device)
        expected = None
        for name, backend, graphs in providers:
            model.sampler.graphs.size = graphs
            with torch.no_grad(), kernels(backend):
                run = partial(_sampled, model, features, sizes)
                found = [run() for _ in range(3)][-1]  # the third of a shape is the second capture's replay
                expected = expected or found
                # Bits of TF32 grow over the steps; what is compared is that it is the same function.
                error = float((found.x_1_hat - expected.x_1_hat).abs().median())
                assert error < 0.05, f"{name}: median endpoint differs by {error}"
                assert len(model.sampler.graphs) == graphs, "the sampler was not captured"
                values = {("time", "ms"): harness.repeated(run, args.device)}
                if args.device == "cuda":
                    values["launches", ""] = [float(harness.launches(run))]
                    values["peak memory", "MiB"] = [harness.peak_mib(run)]
            label = f"B={batch} N={proposals} D={cfg.MODEL.DFM.NUM_PREDICTORS} K={steps}"
            tail = ("size", f"{label} {args.size[0]}x{args.size[1]}")
            for metric, found in values.items():
                where = ("sampler", f"{cfg.MODEL.DFM.HEAD.INTERACTION} {name}", predictors, *metric, *tail)
                on, note = harness.device_name(args.device), f"float32 {args.precision}"
                yield measured(*where, values=found, on=on, note=note)


def format_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Every export format: size, difference from the model, and latency beside it, in turns."""
    opts = ["MODEL.DEVICE", "cpu", *args.opts]
    cfg = load_config(DETECTION, args.config, opts)
    if cfg.MODEL.WEIGHTS:
        model, classes = load_detector(cfg)
    else:
        cfg, model = random_detector(args.config, opts)
        classes = [str(index) for index in range(cfg.MODEL.DFM.NUM_CLASSES)]
    items = [random_images(1, size, "cpu")[0] for size in ((128, 128), (160, 224), (200, 128))]
    if args.images:
        items = [read_test_item({"file_name": f, "image_id": Path(f).stem}, cfg) for f in args.images]
    for steps in args.steps:
        model.sampler.settings = replace(model.sampler.settings, steps=steps)
        eager = prepared_model(model)
        runs = {"eager": partial(eager, items[:1])}

        def row(name: str, metric: str, unit: str, values: list[float], note: str = "", k: int = steps):
            where = ("export", f"{name} {PROVIDER} K={k}", "float32", metric, unit, "steps", k)
            return measured(*where, values=values, on=harness.device_name("cpu"), note=note)

        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            for name in ("torchscript", "onnx", "pt2", "aoti"):
                start, sample = time.perf_counter(), items[0]["image"].float()
                path = export_detector(model, name, folder, cfg, classes, sample)
                yield row(name, "export time", "s", [time.perf_counter() - start])
                yield row(name, "file size", "MiB", [path.stat().st_size / 2**20])
                file = ExportedDetector(path)
                runs[name] = partial(file, items[:1])
                pairs = [(file([item])[0]["instances"], eager([item])[0]["instances"]) for item in items]
                note = f"{sum(len(b) for _, b in pairs)} detections on {len(pairs)} images"
                for metric, unit, value in differences(pairs):
                    yield row(name, metric, unit, [value], note)
            times = harness.in_turns(runs, "cpu", args.repeats)
        shape = tuple(items[0]["image"].shape[1:])
        note = f"one image of {shape}, N={eager.sampler.settings.num_proposals}"
        for name, values in times.items():
            yield row(name, "latency", "ms", values, note)
            if name != "eager":
                ratios = [mine / theirs for mine, theirs in zip(values, times["eager"])]
                yield row(name, "latency / eager", "", ratios, note)


def differences(pairs: list[tuple]) -> Iterator[tuple[str, str, float]]:
    """How far a file's detections are from eager's, over all images: metric, unit, value."""
    same = all(len(a) == len(b) and torch.equal(a.pred_classes, b.pred_classes) for a, b in pairs)
    yield "same classes and number", "", float(same)
    found = [(a, b) for a, b in pairs if len(b)]
    if same and found:
        boxes = [(a.pred_boxes.tensor - b.pred_boxes.tensor).abs().max() for a, b in found]
        yield "greatest box difference", "pixel", float(max(boxes))
        yield "greatest score difference", "", float(max((a.scores - b.scores).abs().max() for a, b in found))


def start_rows(args: argparse.Namespace) -> Iterator[Row]:
    """CPU and wall seconds of a command that has nothing to do but to say something."""
    tool = [sys.executable, str(ROOT / "tools" / "train_net.py")]
    commands = {
        "--help": (["--help"], 0),
        "wrong key": (["--config-file", args.config, "MODEL.NO_SUCH_KEY", "1"], 2),
        "missing file": (["--config-file", "no_such_file.yaml"], 2),
    }
    environment = os.environ | {"DFM_FRAMEWORK": PROVIDER}
    for name, (arguments, expected) in commands.items():
        found: dict[str, list[float]] = {"CPU": [], "wall": []}
        for _ in range(args.repeats):
            begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            status = subprocess.run([*tool, *arguments], env=environment, capture_output=True).returncode
            found["wall"].append(time.perf_counter() - begun)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended
            found["CPU"].append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
            assert status == expected, f"train_net.py {' '.join(arguments)}: {status}"
        for metric, values in found.items():
            where = ("start", f"train_net.py {name}", PROVIDER, metric, "s", "repeats", args.repeats)
            yield measured(*where, values=values, on=harness.device_name("cpu"))


# subject: its rows, and what the command line need not name.
_SIZES = {"steps": [1, 2, 4, 8], "proposals": [100, 300], "batches": [1, 8], "size": (352, 480)}
_SAMPLER_SIZES = {"steps": [4], "proposals": [300], "batches": [1], "size": (800, 1216), "precision": "high"}
SUBJECTS = {
    "detector": (detector_rows, {"config": "bccd_flow_r18.yaml", "name": "latency", **_SIZES}),
    "sampler": (sampler_rows, {"config": "voc_flow_r50.yaml", **_SAMPLER_SIZES}),
    "formats": (format_rows, {"config": "shapes_flow_r18.yaml", "steps": [1, 4], "repeats": 7}),
    "start": (start_rows, {"config": "shapes_flow_r18.yaml", "repeats": 3}),
}


def usual_of(args: argparse.Namespace) -> dict[str, object]:
    """What stands for what the command line leaves out."""
    usual = {"name": args.subject, "precision": "highest", "repeats": 5} | SUBJECTS[args.subject][1]
    return usual | {"config": str(ROOT / "configs" / usual["config"])}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("subject", nargs="?", choices=SUBJECTS, default="detector")
    parser.add_argument("--config")
    parser.add_argument("--proposals", type=int, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--precision", choices=("highest", "high"))
    parser.add_argument("--images", nargs="+", default=[])
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides, last")
    args = harness.parsed(parser, usual_of)
    torch.set_float32_matmul_precision(args.precision)
    harness.reported(SUBJECTS[args.subject][0](args), args.save and args.name)


if __name__ == "__main__":
    sys.exit(exit_status(main))
