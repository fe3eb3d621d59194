"""Trainings for the benchmarks: each (variant, seed) by the tool itself, in a process of its own.

Resumable: a training that is done is not run again, one that was interrupted continues.
"""

import argparse
import importlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import MIB, ROOT, Row, commit, device_name, measured, raw_parser

import dfm_d2.registry  # noqa: F401  (registers the meta-architectures)
from dfm_d2.engine.keys import get_key
from dfm_d2.engine.metrics import METRICS_FILE, read_metrics
from dfm_d2.engine.run import load_for_inference
from dfm_d2.engine.setup import check_run, load_config, resolve_classes
from dfm_d2.engine.task import Task
from dfm_d2.framework import CfgNode

# Where a value is in the rows: provider, mode, metric, unit, x_name, x_value.
Key = tuple[str, str, str, str, str, object]
Scores = Callable[[Path], Mapping[Key, float]]  # of a training, by its folder


@dataclass(frozen=True)
class Study:
    """Trainings of one vertical.

    task: the vertical's. tool: the module under tools/ that trains it. variants: overrides of the config.
    """

    task: Task
    tool: str
    variants: Mapping[str, list[str]]

    def parser(self, description: str) -> argparse.ArgumentParser:
        """The arguments that all of its benchmarks have."""
        parser = raw_parser(description, epilog=f"variants: {', '.join(self.variants)}")
        parser.add_argument("--config", required=True)
        parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this, less one")
        parser.add_argument("--variants", nargs="+", choices=self.variants, metavar="VARIANT")
        parser.add_argument("--device", default="", help="cpu or cuda; else what the config says")
        parser.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.csv, .png")
        parser.add_argument("--name", default="", help="of the results; else the config's")
        parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides, last")
        return parser

    def trained(
        self, args: argparse.Namespace, variant: str, seed: int, folder="", more=(), any_rate=False
    ) -> Path:
        """The folder of a training, which is run if it is not done; see `result_of`.

        folder: a name of its own for a training with the overrides `more`.
        any_rate: one that is there is taken whatever its learning rate, which may have been tuned.
        """
        out = ROOT / "output" / self.tool / op_of(args) / (folder or variant) / f"seed{seed}"
        opts = [*args.opts, *self.variants[variant], *map(str, more)]
        opts += ["SEED", str(seed), "MODEL.DFM.SEED", str(seed)]
        if args.device:
            opts += ["MODEL.DEVICE", args.device]
        if (out / "result.json").exists():
            if not self.same_training(args.config, opts, out, any_rate):
                raise SystemExit(f"{out} was trained with other values: give --name, or delete it")
            return out
        opts += ["OUTPUT_DIR", str(out)]
        # A mistake is an error message here: that of the training's process goes to its log.
        as_trained = argparse.Namespace(resume=True, eval_only=False)
        check_run(self.task, load_config(self.task, args.config, opts), as_trained)
        out.mkdir(parents=True, exist_ok=True)
        print(f"training {folder or variant}, seed {seed}: {out}", flush=True)
        command = [sys.executable, __file__, self.tool, "--config-file", args.config, "--resume", *opts]
        with (out / "stdout.txt").open("a") as log:
            done = subprocess.run(command, stdout=log, stderr=log)
        if done.returncode:
            raise SystemExit(f"{variant}, seed {seed} failed: see {out / 'stdout.txt'}")
        return out

    def same_training(self, config: str, opts: list[str], out: Path, any_rate: bool = False) -> bool:
        """Whether the config of the training in `out` is what `config` with `opts` gives.

        How it evaluates, where its files lie, what it found or chose by its data, and the device may differ;
        the sampler and the device not where `opts` ask for one.
        """
        both = load_config(self.task, config, opts), load_config(self.task, str(out / "config.yaml"), [])
        asked = [key for key in opts[::2] if ".SAMPLER." in key]
        if any(get_key(both[0], key) != get_key(both[1], key) for key in asked):
            return False
        (dfm, trained_dfm), (size, trained_size) = zip(*((cfg.MODEL.DFM, cfg.INPUT) for cfg in both))
        if not dfm.get("NUM_PROPOSALS", 1):
            dfm.NUM_PROPOSALS = trained_dfm.NUM_PROPOSALS
        if not size.get("MIN_SIZE_TRAIN", 1):
            size.update({key: value for key, value in trained_size.items() if "_SIZE_T" in key})
        for cfg in both:
            cfg.OUTPUT_DIR = cfg.VERSION = ""
            cfg.MODEL.DFM.NUM_CLASSES = 0
            if "MODEL.DEVICE" not in opts[::2]:
                cfg.MODEL.DEVICE = ""
            if any_rate:
                cfg.SOLVER.BASE_LR = 0.0
            cfg.TEST = None
            for node in (cfg.MODEL.DFM, cfg.MODEL.get("CLASSIFIER", {})):
                node.pop("SAMPLER", None)
        return both[0].dump() == both[1].dump()

    def load(self, out: Path) -> tuple[CfgNode, torch.nn.Module]:
        """The config of a training, its data sets registered, and its model in evaluation mode."""
        weights = ["MODEL.WEIGHTS", str(out / "model_final.pth")]
        cfg = load_config(self.task, str(out / "config.yaml"), weights)
        self.task.register(cfg)
        return cfg, load_for_inference(self.task, cfg, resolve_classes(cfg))

    def rows(
        self, args: argparse.Namespace, variant: str, scores: Scores, more=(), any_rate=False, folder=""
    ) -> list[Row]:
        """Train a variant with all seeds; the rows of its scores, quantiles over the seeds. See `trained`."""
        seeds = range(args.seeds)
        outs = [self.trained(args, variant, seed, folder, more, any_rate) for seed in seeds]
        # The rate is the training's own: one that was done before may have had another.
        rate = load_config(self.task, str(outs[0] / "config.yaml"), []).SOLVER.BASE_LR
        of, found = result_of(outs[0]), [scores(out) for out in outs]
        note = f"seeds 0-{args.seeds - 1}, {of['iterations']} iterations, BASE_LR {rate:g}: "
        made, rows = {"on": of["device"], "made_by": of["commit"]}, []
        for key in dict.fromkeys(key for scored in found for key in scored):
            values = [scored[key] for scored in found if key in scored]
            said = note + " ".join(f"{value:.4g}" for value in values)
            rows.append(measured(op_of(args), *key, values=values, note=said, **made))
        return rows


def op_of(args: argparse.Namespace) -> str:
    """The name of the results."""
    return args.name or Path(args.config).stem


def result_of(out: Path) -> dict:
    """seconds (of the whole command), peak_mib, commit, device and iterations of a training."""
    return json.loads((out / "result.json").read_text())


def costs_of(variant: str, out: Path) -> dict[Key, float]:
    """Time and peak memory of a training."""
    found, units = result_of(out), {"time": ("seconds", "s"), "peak memory": ("peak_mib", "MiB")}
    return {(variant, "train", name, unit, "seeds", "all"): found[key] for name, (key, unit) in units.items()}


def main(tool: str, *arguments: str) -> int:
    """In the process of its own: train, and write result.json. Returns the tool's exit status."""
    sys.path.insert(0, str(ROOT / "tools"))
    out, begun = Path(arguments[-1]), time.perf_counter()
    status = importlib.import_module(tool).run_command(list(arguments))
    if status == 0:
        on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {
            "seconds": time.perf_counter() - begun,
            "peak_mib": torch.cuda.max_memory_allocated() / MIB if on_gpu else peak,
            "commit": commit(),
            "device": device_name("cuda" if on_gpu else "cpu"),
            "iterations": read_metrics(out / METRICS_FILE)[-1]["iteration"],
        }
        (out / "result.json").write_text(json.dumps(found))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
