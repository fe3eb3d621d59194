#!/usr/bin/env python
"""Steps a second against the number of processes, and the bytes that a step sends.

python benchmarks/scaling.py [--processes 1 2] [--modes data predictor] [--device cpu|cuda] [--save]
                             [--opts KEY VALUE ...]
    Each process has --images images a step (weak scaling). "data": each process has all predictors;
    "predictor": the processes share out the predictors of the images of all. Trains tools/train_net.py for
    --iterations on the generated set of --data (made if it is not there).
python benchmarks/scaling.py --volumes
    Bytes a process sends in a step, by formula (docs/scaling.md), for R50-FPN, batch 16, 8 and 64 processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from rows import Row, commit, device_name, quantiles, save_rows  # noqa: E402


def seconds_of(args: argparse.Namespace, mode: str, processes: int) -> list[float]:
    """Seconds of each iteration, without the first ones."""
    shared_out = mode == "predictor" and processes > 1
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "OUTPUT_DIR": folder,
            "DATASETS.VOC_ROOT": args.data,
            "SOLVER.IMS_PER_BATCH": processes * args.images,
            "SOLVER.MAX_ITER": args.iterations,
            "SOLVER.LOG_PERIOD": 1,
            "TEST.EVAL_PERIOD": 0,
            "DATALOADER.NUM_WORKERS": 0,
            "MODEL.DEVICE": args.device,
            "MODEL.DFM.UPDATE": "parallel" if shared_out else "sequential",
            "MODEL.DFM.PREDICTOR_RANKS": processes if shared_out else 1,
        }
        command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", args.config]
        command += ["--num-gpus", str(processes)]
        command += [str(part) for pair in options.items() for part in pair] + args.opts
        threads = {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        if done.returncode:
            raise SystemExit(f"{mode} parallel with {processes} processes failed:\n{done.stderr[-3000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.json").read_text().splitlines()]
    return [line["time"] for line in lines if "time" in line][3:]


def measure(args: argparse.Namespace) -> list[Row]:
    """Rows of steps and images a second."""
    if not Path(args.data).exists():
        from dfm_d2.detection.data.shapes import write_shapes

        write_shapes(Path(args.data), num_train=64, num_val=2, size=128, seed=0)
    rows, alone = [], None
    tail = (device_name(args.device), torch.__version__, commit(), f"{args.threads} threads a process")
    # One process is the same in both modes.
    runs = [("data", 1)] if 1 in args.processes else []
    runs += [(mode, processes) for mode in args.modes for processes in args.processes if processes > 1]
    for mode, processes in runs:
        p20, p50, p80 = quantiles([1 / s for s in seconds_of(args, mode, processes)])
        alone = p50 if processes == 1 else alone
        metrics = [("steps", "1/s", 1), ("images", "1/s", processes * args.images)]
        if alone is not None:
            metrics.append(("steps of one process", "%", 100 / alone))
        for metric, unit, scale in metrics:
            where = ("training", f"{mode} parallel", "sequential", metric, unit, "processes", str(processes))
            rows.append(Row(*where, p20 * scale, p50 * scale, p80 * scale, *tail))
            print(f"{mode} parallel, {processes} processes: {metric} {p50 * scale:.3g} {unit}", flush=True)
    return rows


def volumes() -> None:
    """The table of docs/scaling.md."""
    import dfm_d2.registry  # noqa: F401  (registers the meta-architectures)
    from dfm_d2.config import add_dfm_config
    from dfm_d2.framework import build_model, get_cfg

    batch, proposals, channels, side = 16, 300, 256, (800, 1088)
    pyramid = sum(-(-side[0] // s) * -(-side[1] // s) for s in (4, 8, 16, 32)) * channels * 4
    print(f"features of an image: {pyramid / 2**20:.1f} MiB; MiB that a process sends in a step:")
    print(f"{'D':>3} {'W':>3} {'G':>3} {'DDP':>6} {'data par.':>9} {'predictor par.':>14} {'pipeline':>9}")
    for count in (6, 12):
        cfg = get_cfg()
        add_dfm_config(cfg)
        cfg.merge_from_file(str(ROOT / "configs" / "voc_flow_r50.yaml"))
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
        cfg.MODEL.DFM.NUM_CLASSES, cfg.MODEL.DFM.NUM_PREDICTORS = 20, count
        blocks = build_model(cfg).blocks()
        size = {name: 4 * sum(p.numel() for _, p in block) for name, block in blocks.items()}
        shared, head = size["shared"], size["predictor0"]
        for world in (8, 64):
            for group in (2, 4, 8):
                if group > count:
                    continue
                images = batch / world
                everything = ring(shared + count * head, world)
                features = 2 * (group - 1) * images * pyramid  # to the others, and their gradients back
                owned = ring(shared, world) + ring(count / group * head, world / group)
                boxes = images * group * proposals * 4 * 4 * count / group  # to the owner of the next one
                queries = 2 * images * group * proposals * (channels + 4) * 4
                found = (everything, everything, features + owned + boxes, features + owned + queries)
                mib = (f"{x / 2**20:.0f}" for x in found)
                print(f"{count:3d} {world:3d} {group:3d} {{:>6}} {{:>9}} {{:>14}} {{:>9}}".format(*mib))


def ring(amount: float, ranks: float) -> float:
    """Bytes that each of the ranks sends to reduce an amount to all."""
    return 2 * (ranks - 1) / ranks * amount if ranks > 1 else 0.0


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--modes", nargs="+", choices=("data", "predictor"), default=["data", "predictor"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--config", default=str(ROOT / "configs" / "shapes_flow_r18.yaml"))
    parser.add_argument("--data", default=str(ROOT / "data" / "scaling"))
    parser.add_argument("--images", type=int, default=4, help="a process and step")
    parser.add_argument("--iterations", type=int, default=23)
    parser.add_argument("--threads", type=int, default=1, help="a process")
    parser.add_argument("--volumes", action="store_true")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scaling_<device>.csv")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides")
    args = parser.parse_args()
    if args.volumes:
        volumes()
        return
    rows = measure(args)
    if args.save:
        print(save_rows(f"scaling_{args.device}", rows))


if __name__ == "__main__":
    main()
