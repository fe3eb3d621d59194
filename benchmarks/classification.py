#!/usr/bin/env python
"""Accuracy of local flow, backprop and Forward-Forward on one backbone, with the controls of transport.

python benchmarks/classification.py --config configs/digits_flow_cnn.yaml --tune --save
python benchmarks/classification.py --config configs/cifar10_flow_vit.yaml --seeds 1 --save \\
    --variants flow backprop
python benchmarks/classification.py --config configs/digits_flow_cnn.yaml --probe --save

--tune: every method first gets the same budget, three learning rates (0.3, 1 and 3 times the config's) on one
seed and a third of the iterations, compared on a fifth of the training images that is set aside; what won
trains all variants of the method.
--probe: what frozen features of every block know instead. Features are a block's output averaged over the
image; the probes are scikit-learn's logistic regression on standardised features, and 5 neighbours. "random"
is the backbone before training.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, Row, draw_panels, lines_of, load_rows, measured, reported
from runs import Key, Study, costs_of, op_of, result_of

from dfm_d2.classification.baselines import ForwardForwardClassifier, unit_square
from dfm_d2.classification.data.loader import build_class_test_loader
from dfm_d2.classification.evaluation import classification_metrics
from dfm_d2.classification.sampler import ClassSampler
from dfm_d2.classification.task import CLASSIFICATION
from dfm_d2.data.catalog import HELD_OUT
from dfm_d2.engine.metrics import METRICS_FILE, read_metrics
from dfm_d2.engine.setup import load_config
from dfm_d2.errors import exit_status
from dfm_d2.framework import build_model

_NO_READOUT = ["MODEL.CLASSIFIER.LOSS.READOUT_WEIGHT", "0.0"]

# Trainings: overrides of the config.
VARIANTS: dict[str, list[str]] = {
    "flow": [],
    "backprop": ["UPDATE.METHOD", "backprop"],
    # The coarser grid favours the linear head on some backbones.
    "backprop_pool_2": ["UPDATE.METHOD", "backprop", "MODEL.CLASSIFIER.POOL", "2"],
    "deep_supervision": ["UPDATE.METHOD", "deep_supervision"],
    "forward_forward": ["UPDATE.METHOD", "forward_forward"],
    "no_readout": _NO_READOUT,
    # The control of transport: the velocity's noise is another image's.
    "x_0_shuffled": [*_NO_READOUT, "MODEL.CLASSIFIER.SHUFFLE_X0", "True"],
    "uniform_time": ["MODEL.CLASSIFIER.TIME_POWER", "1.0"],
    "coarse_pool": ["MODEL.CLASSIFIER.POOL", "2"],
}
STUDY = Study(CLASSIFICATION, "train_classifier", VARIANTS)
RATES = (0.3, 1.0, 3.0)
# Samplers: fields of ClassSamplerSettings. The default has 4 samples.
SAMPLERS: dict[str, dict] = {
    "samples_1": {"samples": 1},
    "samples_8": {"samples": 8},
    "zero_noise": {"noise": 0.0, "samples": 1},
    "uniform": {"weights": "uniform"},
}
UNITS = {"accuracy": "%", "nll": "nats", "ece": "%"}
PROBED = ["flow", "backprop", "forward_forward"]
_IMAGES = 5000  # training images that the probe and the neighbours see at most


def tuned_as(variant: str) -> str:
    """The variant whose learning rate was tuned for this one: the first of its method."""

    def method(name: str) -> str:
        return dict(zip(VARIANTS[name][::2], VARIANTS[name][1::2])).get("UPDATE.METHOD", "flow")

    return next(name for name in VARIANTS if method(name) == method(variant))


def labels_of(loader: Sequence[list[dict]]) -> torch.Tensor:
    """`(n,)`."""
    return torch.tensor([item["label"] for batch in loader for item in batch])


@torch.no_grad()
def probabilities(model, loader: Iterable[list[dict]]) -> torch.Tensor:
    """Class probabilities `(n, K)`."""
    return torch.stack([output["probs"].cpu() for batch in loader for output in model(batch)])


@torch.no_grad()
def sampled(model, loader: Iterable[list[dict]], samplers: Mapping[str, dict]) -> dict[str, torch.Tensor]:
    """Class probabilities `(n, K)` by samplers {name: changed settings}, in one pass of the backbone."""
    images = [
        (model.backbone(model.normalised(batch)), [item["image_id"] for item in batch]) for batch in loader
    ]
    found, usual = {}, model.sampler
    for name, changes in samplers.items():
        settings = dataclasses.replace(usual.settings, **changes)
        model.sampler = ClassSampler(settings, model.criterion.temperature)
        logits = torch.cat([model.pooled_logits(pooled, ids) for pooled, ids in images])
        found[name] = model.probabilities(logits).cpu()
    model.sampler = usual
    return found


def accuracy(probs: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent."""
    return 100 * float((probs.argmax(1) == labels).float().mean())


def tuned_rates(args: argparse.Namespace, variants: list[str]) -> tuple[dict[str, float], list[Row]]:
    """The learning rate of every variant, that of its method, and the rows by which it was chosen."""
    solver = load_config(CLASSIFICATION, args.config, args.opts).SOLVER
    base, iterations = solver.BASE_LR, solver.MAX_ITER
    rows, rates = [], dict.fromkeys(variants, base)
    for method in dict.fromkeys(map(tuned_as, variants)) if args.tune else ():
        scores = {}
        for rate in (base * factor for factor in RATES):
            more = ["SOLVER.BASE_LR", rate, "SOLVER.MAX_ITER", max(iterations // 3, 1)]
            more += ["DATASETS.HOLD_OUT", 0.2, "TEST.EVAL_PERIOD", 0]
            out = STUDY.trained(args, method, 0, f"tune_{method}_{rate:g}", more)
            cfg, model = STUDY.load(out)
            held_out = list(build_class_test_loader(cfg, HELD_OUT))
            scores[rate] = accuracy(probabilities(model, held_out), labels_of(held_out))
            where = (op_of(args), method, "tune", "held-out accuracy", "%", "BASE_LR", f"{rate:g}")
            made = {"on": result_of(out)["device"], "made_by": result_of(out)["commit"]}
            rows.append(measured(*where, values=[scores[rate]], note="seed 0", **made))
        rates |= {v: max(scores, key=scores.get) for v in variants if tuned_as(v) == method}
    return rates, rows


def scores_of(variant: str, out: Path) -> dict[Key, float]:
    """Scores of all samplers (a model without a flow has the default alone), the curve of the accuracy on the
    test images, time and memory of a training."""
    cfg, model = STUDY.load(out)
    test = list(build_class_test_loader(cfg, cfg.DATASETS.TEST[0]))
    labels, begun = labels_of(test), time.perf_counter()
    found = {"default": probabilities(model, test)}
    milliseconds = 1000 * (time.perf_counter() - begun) / len(labels)
    if hasattr(model, "sampler"):
        blocks = {f"block_{d}": {"blocks": (d,)} for d in range(model.num_blocks)}
        if model.num_blocks > 1:
            blocks["last_two"] = {"blocks": (-2, -1)}
        found |= sampled(model, test, SAMPLERS | blocks)
    scores: dict[Key, float] = {}
    for name, probs in found.items():
        metrics = classification_metrics(probs.double().numpy(), labels.numpy(), [])
        for metric in (metric for metric in UNITS if metric in metrics):
            scores[variant, "eval", metric, UNITS[metric], "sampler", name] = metrics[metric]
    scores[variant, "eval", "ms an image", "ms", "sampler", "default"] = milliseconds
    last = result_of(out)["iterations"]
    for line in read_metrics(out / METRICS_FILE):
        if "accuracy" in line:
            # The line of the last evaluation has the iteration that would come next.
            at = min(line["iteration"] + 1, last)
            scores[variant, "curve", "accuracy", "%", "iteration", at] = line["accuracy"]
    return scores | costs_of(variant, out)


@torch.no_grad()
def features(model, loader: Sequence[list[dict]]) -> list[np.ndarray]:
    """Averaged outputs `(n, C)` of every block, of images without a label in them.

    Of Forward-Forward, the inputs of blocks after the first are normalised as its own are.
    """
    normalised = isinstance(model, ForwardForwardClassifier)
    found: list[list] = [[] for _ in range(model.num_blocks)]
    for batch in loader:
        x = model.normalised(batch)
        for d in range(model.num_blocks):
            x = model.backbone.forward_block(d, unit_square(x) if normalised and d > 0 else x)
            found[d].append(model.backbone.grid(x).mean((2, 3)).cpu().numpy())
    return [np.concatenate(parts) for parts in found]


def spread(loader: Sequence[list[dict]], limit: int) -> list[list[dict]]:
    """At most `limit` of the images, evenly from the whole set, which may be sorted by class."""
    items = [item for batch in loader for item in batch]
    chosen = np.linspace(0, len(items) - 1, min(limit, len(items))).round().astype(int)
    size = len(loader[0])
    return [[items[i] for i in chosen[start : start + size]] for start in range(0, len(chosen), size)]


def probed(variant: str, out: Path) -> dict[Key, float]:
    """What frozen features know; beside those of backprop the ones of its backbone before training."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    cfg, model = STUDY.load(out)
    train = spread(list(build_class_test_loader(cfg, cfg.DATASETS.TRAIN[0])), _IMAGES)
    test = list(build_class_test_loader(cfg, cfg.DATASETS.TEST[0]))
    models, scores = {variant: model}, {}
    if variant == "backprop":
        torch.manual_seed(cfg.SEED)
        models["random"] = build_model(cfg).eval()
    for name, model in models.items():
        for d, (known, unknown) in enumerate(zip(features(model, train), features(model, test))):
            probes = {"linear probe": LogisticRegression(max_iter=2000)}
            probes |= {"5 neighbours": KNeighborsClassifier(5)}
            for kind, probe in probes.items():
                fitted = make_pipeline(StandardScaler(), probe).fit(known, labels_of(train))
                value = 100 * float(fitted.score(unknown, labels_of(test)))
                scores[name, kind, "accuracy", "%", "block", d] = value
    return scores


def main() -> None:
    parser = STUDY.parser(__doc__)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args()
    if args.probe:
        name, rows = f"representation_{op_of(args)}", []
        for variant in args.variants or PROBED:
            rows += STUDY.rows(args, variant, partial(probed, variant), any_rate=True)
        reported(rows, args.save and name)
        kinds = dict.fromkeys(row.mode for row in rows)
        panels = {kind: ("block", lines_of(row for row in rows if row.mode == kind)) for kind in kinds}
        title = f"{op_of(args)}: frozen features of each block"
    else:
        name, variants = f"classification_{op_of(args)}", args.variants or list(VARIANTS)
        rates, tuning = tuned_rates(args, variants)
        # Saving a variant's rows replaces its older ones: those of a tuning are saved with what it was for.
        rows = [row for row in tuning if row.provider in variants]
        for variant in variants:
            more = ["SOLVER.BASE_LR", rates[variant]]
            rows += STUDY.rows(args, variant, partial(scores_of, variant), more)
        reported(rows, args.save and name)
        curves = [row for row in load_rows(name) if row.mode == "curve"]
        panels = {"training": ("iteration", lines_of(curves))} if curves else {}
        title = f"{op_of(args)}: accuracy on the test images, {rows[0].device}"
    if args.save and panels:
        print(draw_panels(RESULTS / f"{name}.png", title, "accuracy (%)", panels))


if __name__ == "__main__":
    sys.exit(exit_status(main))
