#!/usr/bin/env python
"""Every export format on every framework that is here: whether it is equal, its size and its latency.

python benchmarks/formats.py --config-file output/demo/config.yaml [--steps 1 4] [--save] \\
    [--opts MODEL.WEIGHTS output/demo/model_final.pth]
    --images a.jpg b.jpg     photographs to compare on; none: three generated images of three sizes

Each framework runs in a process of its own. Without MODEL.WEIGHTS the weights are random. Files run on the
CPU with one thread a process; latency is that of one image, all in turns, pixels to Instances.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from rows import Row, commit, device_name, quantiles, save_rows  # noqa: E402
from timing import in_turns  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=str(ROOT / "configs" / "shapes_flow_r18.yaml"))
    parser.add_argument("--formats", nargs="+", default=["torchscript", "onnx", "pt2", "aoti"])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--images", nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", default="formats_cpu", help="of the rows")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.csv")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides")
    args = parser.parse_args()
    if args.child:
        print(json.dumps([measured for steps in args.steps for measured in measure_files(args, steps)]))
        return
    frameworks = ["builtin"] + ["detectron2"] * (importlib.util.find_spec("detectron2") is not None)
    rows = [row for framework in frameworks for row in in_process(framework)]
    if args.save:
        print(save_rows(args.name, rows))


def in_process(framework: str) -> list[Row]:
    """The rows of one framework, measured in a process of its own by this script."""
    environment = os.environ | {"DFM_FRAMEWORK": framework, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--child", *sys.argv[1:]]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows = []
    for file_format, steps, metric, unit, values, note in json.loads(done.stdout.splitlines()[-1]):
        rows.append(
            Row(
                "export", f"{file_format} {framework} K={steps}", "float32", metric, unit, "steps",
                str(steps), *quantiles(values), device_name("cpu"), torch.__version__, commit(), note,
            )
        )  # fmt: skip
        row = rows[-1]
        print(f"{row.provider:28s} {row.metric:24s} {row.p50:.4g} {row.unit}", flush=True)
    return rows


def measure_files(args: argparse.Namespace, steps: int) -> list[tuple]:
    """(format, steps, metric, unit, values, note) of every format."""
    from dfm_d2.detection.exportable import export_detector, prepared_model
    from dfm_d2.detection.exported_detector import ExportedDetector
    from dfm_d2.detection.loading import load_detector
    from dfm_d2.detection.task import DETECTION
    from dfm_d2.engine.setup import load_config
    from dfm_d2.framework import build_model

    opts = ["MODEL.DEVICE", "cpu", *args.opts, "MODEL.DFM.SAMPLER.STEPS", str(steps)]
    cfg = load_config(DETECTION, args.config_file, opts)
    if cfg.MODEL.WEIGHTS:
        model, classes = load_detector(cfg)
    else:
        cfg.MODEL.DFM.NUM_CLASSES = cfg.MODEL.DFM.NUM_CLASSES or 6
        torch.manual_seed(0)
        model, classes = build_model(cfg).eval(), [str(i) for i in range(cfg.MODEL.DFM.NUM_CLASSES)]
    eager = prepared_model(model)
    items = items_of(args, cfg)
    found = []
    runs = {"eager": lambda: eager(items[:1])}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name in args.formats:
            start = time.perf_counter()
            path = export_detector(model, name, folder, cfg, classes, items[0]["image"].float())
            found.append((name, steps, "export time", "s", [time.perf_counter() - start], ""))
            found.append((name, steps, "file size", "MiB", [path.stat().st_size / 2**20], ""))
            file = ExportedDetector(path)
            pairs = [(file([item])[0]["instances"], eager([item])[0]["instances"]) for item in items]
            found += [(name, steps, *row) for row in differences(pairs)]
            runs[name] = lambda file=file: file(items[:1])
        times = in_turns(runs, "cpu", args.repeats)
    note = f"one image of {tuple(items[0]['image'].shape[1:])}, N={eager.sampler.settings.num_proposals}"
    for name, values in times.items():
        found.append((name, steps, "latency", "ms", values, note))
        if name != "eager":
            ratios = [mine / theirs for mine, theirs in zip(values, times["eager"])]
            found.append((name, steps, "latency / eager", "", ratios, note))
    return found


def differences(pairs: list[tuple]) -> list[tuple[str, str, list[float], str]]:
    """How far the file's detections are from eager's, over all images: rows of metric, unit, values, note."""
    same = all(
        len(a) == len(b) and torch.equal(a.pred_classes, b.pred_classes) for a, b in pairs
    )  # fmt: skip
    note = f"{sum(len(b) for _, b in pairs)} detections on {len(pairs)} images"
    rows = [("same classes and number", "", [float(same)], note)]
    if same:
        boxes = max(
            float((a.pred_boxes.tensor - b.pred_boxes.tensor).abs().max()) for a, b in pairs if len(b)
        )
        scores = max(float((a.scores - b.scores).abs().max()) for a, b in pairs if len(b))
        rows += [("greatest box difference", "pixel", [boxes], note)]
        rows += [("greatest score difference", "", [scores], note)]
    return rows


def items_of(args: argparse.Namespace, cfg) -> list[dict]:
    from dfm_d2.detection.data.loader import read_test_item

    if args.images:
        return [read_test_item({"file_name": f, "image_id": Path(f).stem}, cfg) for f in args.images]
    generator = torch.Generator().manual_seed(0)
    sizes = ((128, 128), (160, 224), (200, 128))
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    return [{"image": image, "image_id": i} for i, image in enumerate(images)]


if __name__ == "__main__":
    main()
