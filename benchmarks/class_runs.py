"""Trained classifiers for the benchmarks: each (variant, seed) by the tool itself, in a process of its own.

Resumable: a training that is done is not run again, one that was interrupted continues.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from rows import commit, device_name  # noqa: E402

from dfm_d2.classification.backbone import block_outputs  # noqa: E402
from dfm_d2.classification.data.loader import build_class_test_loader  # noqa: E402
from dfm_d2.classification.sampler import ClassSampler  # noqa: E402
from dfm_d2.classification.task import CLASSIFICATION  # noqa: E402
from dfm_d2.engine.run import load_for_inference  # noqa: E402
from dfm_d2.engine.setup import load_config, resolve_classes  # noqa: E402

_NO_READOUT = ["MODEL.CLASSIFIER.LOSS.READOUT_WEIGHT", "0.0"]

# Trainings: overrides of the config.
VARIANTS: dict[str, list[str]] = {
    "flow": [],
    "backprop": ["UPDATE.METHOD", "backprop"],
    # The coarser grid favours the linear head on some backbones.
    "backprop_pool_2": ["UPDATE.METHOD", "backprop", "MODEL.CLASSIFIER.POOL", "2"],
    "forward_forward": ["UPDATE.METHOD", "forward_forward"],
    "stochastic_ff": ["UPDATE.METHOD", "stochastic_forward_forward"],
    "no_readout": _NO_READOUT,
    # The control of transport: the velocity's noise is another image's.
    "x_0_shuffled": [*_NO_READOUT, "MODEL.CLASSIFIER.SHUFFLE_X0", "True"],
    "joint": ["MODEL.DFM.UPDATE", "joint"],
    "uniform_time": ["MODEL.CLASSIFIER.TIME_POWER", "1.0"],
    "coarse_pool": ["MODEL.CLASSIFIER.POOL", "2"],
    "velocity_weight": ["MODEL.CLASSIFIER.LOSS.WEIGHTING", "velocity"],
    "one_point": ["MODEL.CLASSIFIER.NOISE_SAMPLES", "1"],
    "learned": ["MODEL.CLASSIFIER.EMBEDDING", "learned"],
}


def tuned_as(variant: str) -> str:
    """The variant whose learning rate was tuned for this one: the first of its method."""

    def method(name: str) -> str:
        return dict(zip(VARIANTS[name][::2], VARIANTS[name][1::2])).get("UPDATE.METHOD", "flow")

    return next(name for name in VARIANTS if method(name) == method(variant))


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all benchmarks of classifiers have."""
    raw = argparse.RawDescriptionHelpFormatter
    arguments = argparse.ArgumentParser(description=description, formatter_class=raw)
    arguments.add_argument("--config", required=True)
    arguments.add_argument("--seeds", type=int, default=3, help="seeds 0 to this, less one")
    arguments.add_argument("--variants", nargs="+", choices=VARIANTS)
    arguments.add_argument("--device", default="", help="cpu or cuda; else what the config says")
    arguments.add_argument("--name", default="", help="of the results; else the config's")
    arguments.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides")
    return arguments


def op_of(args: argparse.Namespace) -> str:
    """The name of the results."""
    return args.name or Path(args.config).stem


def trained(
    args: argparse.Namespace,
    variant: str,
    seed: int,
    folder: str = "",
    more: Iterable = (),
    any_rate: bool = False,
) -> Path:
    """The folder of a training, which is run if it is not done; result.json has its time and memory.

    folder: a name of its own for a training with the overrides `more`.
    any_rate: one that is there is taken whatever its learning rate, which may have been tuned.
    """
    out = ROOT / "output" / "classification" / op_of(args) / (folder or variant) / f"seed{seed}"
    result = out / "result.json"
    opts = [*args.opts, *VARIANTS[variant], *map(str, more), "SEED", str(seed), "MODEL.DFM.SEED", str(seed)]
    if args.device:
        opts += ["MODEL.DEVICE", args.device]
    if result.exists():
        if not same_training(args.config, opts, out, any_rate):
            raise SystemExit(f"{out} was trained with other values: give --name, or delete it")
        return out
    command = [
        sys.executable,
        str(ROOT / "tools/train_classifier.py"),
        "--config-file",
        args.config,
        "--resume",
    ]
    out.mkdir(parents=True, exist_ok=True)
    print(f"training {folder or variant}, seed {seed}: {out}", flush=True)
    begun = time.perf_counter()
    with (out / "stdout.txt").open("a") as log:
        child = subprocess.Popen([*command, *opts, "OUTPUT_DIR", str(out)], stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)  # the only way to the peak memory of this child alone
    if status:
        raise SystemExit(f"{variant}, seed {seed} failed: see {out / 'stdout.txt'}")
    iterations = json.loads((out / "metrics.json").read_text().splitlines()[-1])["iteration"]
    found = {"seconds": time.perf_counter() - begun, "peak_mib": usage.ru_maxrss / 1024, "commit": commit(),
             "device": device_name(args.device or "cpu"), "iterations": iterations}  # fmt: skip
    result.write_text(json.dumps(found))
    return out


def same_training(config: str, opts: list[str], out: Path, any_rate: bool = False) -> bool:
    """Whether the config of the training in `out` is what `config` with `opts` gives.

    How it evaluates, where its files lie, and the classes that it found, may differ.
    """
    wanted = load_config(CLASSIFICATION, config, opts)
    had = load_config(CLASSIFICATION, str(out / "config.yaml"), [])
    for cfg in (wanted, had):
        cfg.defrost()
        cfg.OUTPUT_DIR = cfg.VERSION = ""
        cfg.MODEL.DFM.NUM_CLASSES = 0
        if any_rate:
            cfg.SOLVER.BASE_LR = 0.0
        cfg.TEST = cfg.MODEL.CLASSIFIER.SAMPLER = None
    return wanted.dump() == had.dump()


def result_of(out: Path) -> dict:
    """seconds (of the whole command), peak_mib, commit, device and iterations of a training."""
    return json.loads((out / "result.json").read_text())


def load(out: Path):
    """The config of a training, its data sets registered, and its model in evaluation mode."""
    cfg = load_config(
        CLASSIFICATION, str(out / "config.yaml"), ["MODEL.WEIGHTS", str(out / "model_final.pth")]
    )
    CLASSIFICATION.register(cfg)
    classes = resolve_classes(cfg)
    return cfg, load_for_inference(CLASSIFICATION, cfg, classes)


def batches(cfg, name: str) -> list[list[dict]]:
    """All batches of a registered set."""
    return list(build_class_test_loader(cfg, name))


@torch.no_grad()
def probabilities(model, loader: Iterable[list[dict]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Class probabilities `(n, K)` and labels `(n,)`."""
    probs, labels = [], []
    for batch in loader:
        probs += [output["probs"].cpu() for output in model(batch)]
        labels += [item["label"] for item in batch]
    return torch.stack(probs), torch.tensor(labels)


class Seen(NamedTuple):
    """One pass of a flow's backbone over a set, for many samplers: of each batch the pooled outputs of the
    blocks and the image ids; all labels `(n,)`."""

    batches: list[tuple[list[torch.Tensor], list]]
    labels: torch.Tensor


@torch.no_grad()
def seen(model, loader: Iterable[list[dict]]) -> Seen:
    """The pass itself."""
    found, labels = [], []
    for batch in loader:
        pooled = block_outputs(model.backbone, model.normalised(batch))
        found.append((pooled, [item["image_id"] for item in batch]))
        labels += [item["label"] for item in batch]
    return Seen(found, torch.tensor(labels))


@torch.no_grad()
def sampled(model, images: Seen, **changes) -> torch.Tensor:
    """Class probabilities `(n, K)` by a sampler with these settings changed."""
    usual = model.sampler
    settings = dataclasses.replace(usual.settings, **changes)
    model.sampler = ClassSampler(settings, model.criterion.temperature)
    try:
        logits = [model.flow_logits(pooled, ids) for pooled, ids in images.batches]
    finally:
        model.sampler = usual
    return model.probabilities(torch.cat(logits)).cpu()


def accuracy_of(probs: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent."""
    return 100 * float((probs.argmax(1) == labels).float().mean())


def accuracy(model, loader: Iterable[list[dict]]) -> float:
    """Percent."""
    return accuracy_of(*probabilities(model, loader))
