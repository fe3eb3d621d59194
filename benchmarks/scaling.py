#!/usr/bin/env python
"""Steps a second of training against the number of processes, and the bytes that a step sends.

python benchmarks/scaling.py [--processes 1 2] [--config FILE] [--device cpu|cuda] [--save]
    Each process has 4 images a step (weak scaling) and one thread. "data": each process has all predictors;
    "predictor": the processes share out the predictors of the images of all. Trains tools/train_net.py for 23
    iterations on a generated set in data/scaling (made if it is not there).
python benchmarks/scaling.py --volumes
    Bytes a process sends in a step, by formula (docs/scaling.md), for R50-FPN, batch 16, 8 and 64 processes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import harness
from harness import MIB, ROOT, Row, measured, quantiles

from dfm_d2.detection.data.shapes import write_shapes
from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.metrics import METRICS_FILE, read_metrics
from dfm_d2.engine.setup import load_config
from dfm_d2.errors import exit_status

DATA, IMAGES = ROOT / "data" / "scaling", 4  # images a process and step


def iterations_of(args: argparse.Namespace, mode: str, processes: int) -> list[dict]:
    """The metrics of each iteration, without the first ones."""
    shared_out = mode == "predictor" and processes > 1
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "OUTPUT_DIR": folder,
            "DATASETS.VOC_ROOT": DATA,
            "SOLVER.IMS_PER_BATCH": processes * IMAGES,
            "SOLVER.MAX_ITER": 23,
            "SOLVER.LOG_PERIOD": 1,
            "TEST.EVAL_PERIOD": 0,
            "DATALOADER.NUM_WORKERS": 0,
            "MODEL.DEVICE": args.device,
            "MODEL.DFM.UPDATE": "parallel" if shared_out else "sequential",
            "MODEL.DFM.PREDICTOR_RANKS": processes if shared_out else 1,
        }
        command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", args.config]
        command += ["--num-gpus", str(processes), *(str(part) for pair in options.items() for part in pair)]
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        if done.returncode:
            raise SystemExit(f"{mode} parallel with {processes} processes failed:\n{done.stderr[-3000:]}")
        return [line for line in read_metrics(Path(folder) / METRICS_FILE) if "time" in line][3:]


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of steps and images a second, and of the share of a step that waits for data."""
    if not DATA.exists():
        write_shapes(DATA, num_train=64, num_val=2, size=128, seed=0)
    hardware, alone = harness.device_name(args.device), None
    # One process is the same in both modes.
    runs = [("data", 1)] if 1 in args.processes else []
    runs += [(mode, number) for mode in ("data", "predictor") for number in args.processes if number > 1]
    for mode, processes in runs:
        lines = iterations_of(args, mode, processes)
        steps = [1 / line["time"] for line in lines]
        alone = quantiles(steps)[1] if processes == 1 else alone
        found = {
            ("steps", "1/s"): steps,
            ("images", "1/s"): [processes * IMAGES * value for value in steps],
            ("data", "%"): [100 * line["data_time"] / line["time"] for line in lines],
        }
        if alone is not None:
            found["steps of one process", "%"] = [100 * value / alone for value in steps]
        for metric, values in found.items():
            where = ("training", f"{mode} parallel", "sequential", *metric, "processes", processes)
            yield measured(*where, values=values, on=hardware, note="1 threads a process")


def volumes() -> None:
    """The table of docs/scaling.md."""
    batch, proposals, channels, side = 16, 300, 256, (800, 1088)
    pyramid = sum(-(-side[0] // s) * -(-side[1] // s) for s in (4, 8, 16, 32)) * channels * 4
    print(f"features of an image: {pyramid / MIB:.1f} MiB; MiB that a process sends in a step:")
    print(f"{'D':>3} {'W':>3} {'G':>3} {'DDP':>6} {'data par.':>9} {'predictor par.':>14} {'pipeline':>9}")
    for count in (6, 12):
        opts = ["MODEL.DEVICE", "cpu", "MODEL.DFM.NUM_PREDICTORS", count]
        blocks = harness.random_detector(str(ROOT / "configs" / "voc_flow_r50.yaml"), opts)[1].blocks()
        size = {name: 4 * sum(p.numel() for _, p in block) for name, block in blocks.items()}
        shared, head = size["shared"], size["predictor0"]
        for world, group in ((w, g) for w in (8, 64) for g in (2, 4, 8) if g <= count):
            images = batch / world
            everything = ring(shared + count * head, world)
            features = 2 * (group - 1) * images * pyramid  # to the others, and their gradients back
            owned = ring(shared, world) + ring(count / group * head, world / group)
            # Of each query its own channels, a box, 20 class logits and an int64, from all but the last
            # predictor to the other members.
            told = 4 * (channels + 4 + 20 + 2) * images * group * proposals
            told *= (group - 1) * (count - 1) / group
            queries = 2 * images * group * proposals * (channels + 4) * 4
            found = (everything, everything, features + owned + told, features + owned + queries)
            mib = (f"{x / MIB:.0f}" for x in found)
            print(f"{count:3d} {world:3d} {group:3d} {{:>6}} {{:>9}} {{:>14}} {{:>9}}".format(*mib))


def ring(amount: float, ranks: float) -> float:
    """Bytes that each of the ranks sends to reduce an amount to all."""
    return 2 * (ranks - 1) / ranks * amount if ranks > 1 else 0.0


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--config", default=str(ROOT / "configs" / "shapes_flow_r18.yaml"))
    parser.add_argument("--volumes", action="store_true")
    args = harness.parsed(parser, lambda _: {"name": "scaling"})
    if args.volumes:
        return volumes()
    load_config(DETECTION, args.config, [])  # a mistake is an error at once
    harness.reported(rows_of(args), args.save and args.name)


if __name__ == "__main__":
    sys.exit(exit_status(main))
