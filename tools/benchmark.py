#!/usr/bin/env python
"""How fast a config trains, reads its data and evaluates: the loops of Detectron2's tools/benchmark.py.

python tools/benchmark.py --task train --config-file configs/shapes_flow_r18.yaml [--iterations 100]
python tools/benchmark.py --task data --config-file ...     batches of the training stream alone
python tools/benchmark.py --task eval --config-file ... [MODEL.WEIGHTS model_final.pth]

Runs on both providers of the framework. Nothing is saved but a log in OUTPUT_DIR/benchmark. Training is from
random weights, and so is evaluation without MODEL.WEIGHTS: then NMS has other work to do. train and data run
in as many processes as --num-gpus says; images/s is of all of them.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

import dfm_d2.registry  # noqa: E402, F401  (registers the meta-architectures)
from dfm_d2.detection.task import DETECTION  # noqa: E402
from dfm_d2.engine.hooks import ProgressBar  # noqa: E402
from dfm_d2.engine.launch import run_processes  # noqa: E402
from dfm_d2.engine.precision import inference_autocast  # noqa: E402
from dfm_d2.engine.run import build_trainer, load_for_inference  # noqa: E402
from dfm_d2.engine.setup import load_config, setup_run, uses_gpu  # noqa: E402
from dfm_d2.errors import UserError, input_errors  # noqa: E402
from dfm_d2.framework import (  # noqa: E402
    CfgNode,
    IterationTimer,
    LRScheduler,
    build_model,
    comm,
    default_argument_parser,
)

# Calls that are not timed: allocators, caches and workers fill up in them.
WARMUP = 5
# Batches that an evaluation goes round in, read beforehand.
KEPT_BATCHES = 100


def run_command(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--iterations", type=int, default=100, help="those that are timed")
    args = parser.parse_args(arguments)
    if args.iterations < 1:
        parser.error(f"--iterations is {args.iterations}; it must be at least 1")
    if args.eval_only or args.resume:
        parser.error("--eval-only and --resume are for tools/train_net.py: choose a --task")
    if args.task == "eval" and args.num_gpus * args.num_machines > 1:
        parser.error("--task eval runs in one process: leave --num-gpus and --num-machines out")
    try:
        on_gpu = uses_gpu(load_config(DETECTION, args.config_file, args.opts))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_processes(main, args, on_gpu)


def main(args: argparse.Namespace) -> list[float]:
    """Seconds of each iteration; the main process prints their gist. Raises UserError, one sentence."""
    cfg = load_config(DETECTION, args.config_file, args.opts)
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "benchmark")
    # The schedule has no rate beyond its end.
    cfg.SOLVER.MAX_ITER = max(cfg.SOLVER.MAX_ITER, WARMUP + args.iterations)
    classes = setup_run(DETECTION, cfg, args)
    seconds, images = TASKS[args.task](cfg, classes, args.iterations)
    if comm.is_main_process():
        typical = statistics.median(seconds)
        print(
            f"{args.task}: {len(seconds)} iterations, median {typical:.4g} s, "
            f"{images / sum(seconds):.4g} images/s{_peak_memory(cfg)}",
            flush=True,
        )
    return seconds


def time_training(cfg: CfgNode, classes: list[str], iterations: int) -> tuple[list[float], int]:
    """Of whole iterations: data, forward, backward, optimizer."""
    with input_errors():
        model = build_model(cfg)
    trainer = build_trainer(DETECTION, cfg, model)
    trainer.register_hooks([IterationTimer(WARMUP), LRScheduler(trainer.optimizer, trainer.scheduler)])
    if comm.is_main_process():
        trainer.register_hooks([ProgressBar(cfg.SOLVER.LOG_PERIOD)])
    model.train()
    trainer.train(0, WARMUP + iterations)
    seconds = [value for value, _ in trainer.storage.history("time").values()][-iterations:]
    return seconds, cfg.SOLVER.IMS_PER_BATCH * len(seconds)


def time_data(cfg: CfgNode, classes: list[str], iterations: int) -> tuple[list[float], int]:
    """Of one batch of the training stream after the other."""
    with input_errors():
        batches = iter(DETECTION.train_loader(cfg, 0))
        for _ in range(WARMUP):
            next(batches)
        seconds, counts = _timed(lambda _: len(next(batches)), range(iterations), cfg)
    return seconds, sum(counts) * comm.get_world_size()


@torch.no_grad()
def time_evaluation(cfg: CfgNode, classes: list[str], iterations: int) -> tuple[list[float], int]:
    """Of the model alone, on batches that are in memory."""
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a data set, such as voc_root_val.")
    if cfg.MODEL.WEIGHTS:
        model = load_for_inference(DETECTION, cfg, classes)
    else:
        with input_errors():
            model = build_model(cfg).eval()
    with input_errors():
        loader = DETECTION.test_loader(cfg, cfg.DATASETS.TEST[0])
        kept = list(itertools.islice(loader, KEPT_BATCHES))
    with inference_autocast(cfg):
        for batch in _round(kept, WARMUP):
            model(batch)
        seconds, counts = _timed(lambda batch: len(model(batch)), _round(kept, iterations), cfg)
    return seconds, sum(counts)


TASKS = {"train": time_training, "data": time_data, "eval": time_evaluation}


def _round(batches: list[list[dict]], number: int) -> Iterator[list[dict]]:
    return itertools.islice(itertools.cycle(batches), number)


def _timed(
    call: Callable[[object], int], inputs: Iterable[object], cfg: CfgNode
) -> tuple[list[float], list[int]]:
    """Seconds and answer of each call, with a progress bar."""
    seconds, answers = [], []
    for value in tqdm.tqdm(list(inputs), unit="it", dynamic_ncols=True, disable=not comm.is_main_process()):
        start = time.perf_counter()
        answers.append(call(value))
        if uses_gpu(cfg):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds, answers


def _peak_memory(cfg: CfgNode) -> str:
    return f", peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if uses_gpu(cfg) else ""


if __name__ == "__main__":
    sys.exit(run_command())
