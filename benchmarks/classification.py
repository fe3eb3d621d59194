#!/usr/bin/env python
"""Accuracy of local flow, backprop and Forward-Forward on one backbone, with the controls of transport.

python benchmarks/classification.py --config configs/digits_flow_cnn.yaml --tune
python benchmarks/classification.py --config configs/cifar10_flow_vit.yaml --seeds 1 --variants flow backprop

--tune: every method first gets the same budget, three learning rates (0.3, 1 and 3 times the config's) on one
seed and a third of the iterations, compared on a fifth of the training images that is set aside; what won
trains all variants of the method.
"""

import argparse
import time
from pathlib import Path

import torch
from class_figures import draw_panels, line_of
from class_runs import (
    VARIANTS,
    accuracy,
    batches,
    load,
    op_of,
    parser,
    probabilities,
    result_of,
    sampled,
    seen,
    trained,
    tuned_as,
)
from rows import RESULTS, Row, load_rows, quantiles, save_rows

from dfm_d2.classification.data.registration import HELD_OUT
from dfm_d2.classification.evaluation import classification_metrics
from dfm_d2.classification.task import CLASSIFICATION
from dfm_d2.engine.metrics import METRICS_FILE, read_metrics
from dfm_d2.engine.setup import load_config

RATES = (0.3, 1.0, 3.0)
# Samplers: fields of ClassSamplerSettings. The default, one step of 4 samples, spends on
# fresh noise what "steps_4" spends on steps.
SAMPLERS: dict[str, dict] = {
    "steps_1": {"steps": 1, "samples": 1},
    "steps_4": {"steps": 4, "samples": 1},
    "steps_16": {"steps": 16, "samples": 1},
    "heun_4": {"steps": 4, "samples": 1, "method": "heun"},
    "steps_4_samples_8": {"steps": 4, "samples": 8},
    "steps_1_samples_8": {"steps": 1, "samples": 8},
    "zero_noise": {"noise": 0.0, "samples": 1},
    "zero_noise_4": {"noise": 0.0, "samples": 1, "steps": 4},
    "uniform": {"weights": "uniform"},
    "probability": {"aggregation": "probability"},
    "other_seed": {"seed": 1},
}


def tuned_rates(args: argparse.Namespace, variants: list[str]) -> tuple[dict[str, float], list[Row]]:
    """The learning rate of every variant, that of its method, and the rows by which it was chosen."""
    solver = load_config(CLASSIFICATION, args.config, args.opts).SOLVER
    base, iterations = solver.BASE_LR, solver.MAX_ITER
    if not args.tune:
        return dict.fromkeys(variants, base), []
    rows, rates = [], {}
    for method in dict.fromkeys(map(tuned_as, variants)):
        scores = {}
        for factor in RATES:
            more = ["SOLVER.BASE_LR", base * factor, "SOLVER.MAX_ITER", max(iterations // 3, 1)]
            more += ["DATASETS.HOLD_OUT", 0.2, "TEST.EVAL_PERIOD", 0]
            out = trained(args, method, 0, f"tune_{method}_{factor}", more)
            cfg, model = load(out)
            scores[factor] = accuracy(model, batches(cfg, HELD_OUT))
            found = result_of(out)
            rows.append(
                Row(op_of(args), method, "tune", "held-out accuracy", "%", "BASE_LR", f"{base * factor:g}",
                    *[scores[factor]] * 3, found["device"], torch.__version__, found["commit"], "seed 0")
            )  # fmt: skip
        best = base * max(scores, key=scores.get)
        rates |= {v: best for v in variants if tuned_as(v) == method}
    return rates, rows


def evaluations(out: Path) -> dict[str, dict[str, float]]:
    """{sampler: {metric: value}} of a training; a model without a flow has the default alone."""
    cfg, model = load(out)
    test = batches(cfg, cfg.DATASETS.TEST[0])
    begun = time.perf_counter()
    probs, labels = probabilities(model, test)
    seconds = time.perf_counter() - begun
    found = {"default": {**metrics_of(probs, labels), "ms an image": 1000 * seconds / len(labels)}}
    if hasattr(model, "sampler"):
        images = seen(model, test)
        blocks = {f"block_{d}": {"blocks": (d,)} for d in range(model.num_blocks)}
        if model.num_blocks > 1:
            blocks["last_two"] = {"blocks": (-2, -1)}
        for name, changes in (SAMPLERS | blocks).items():
            found[name] = metrics_of(sampled(model, images, **changes), labels)
    return found


def metrics_of(probs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """accuracy, nll and ece."""
    return classification_metrics(probs.double().numpy(), labels.numpy(), [])


def rows_of(args: argparse.Namespace, variant: str, outs: list[Path]) -> list[Row]:
    """Quantiles over the seeds of one variant."""
    results = [result_of(out) for out in outs]
    scores = [evaluations(out) for out in outs]
    # Of the training itself: one that was done before may have had another.
    rate = load_config(CLASSIFICATION, str(outs[0] / "config.yaml"), []).SOLVER.BASE_LR
    tail = (results[0]["device"], torch.__version__, results[0]["commit"])
    note = f"seeds 0-{len(outs) - 1}, {results[0]['iterations']} iterations, BASE_LR {rate:g}"
    rows = []
    units = {"accuracy": "%", "nll": "nats", "ece": "%", "ms an image": "ms"}
    for sampler in scores[0]:
        for metric, unit in units.items():
            if metric not in scores[0][sampler]:
                continue
            values = [score[sampler][metric] for score in scores]
            said = f"{note}: {' '.join(f'{value:.2f}' for value in values)}" if metric == "accuracy" else note
            rows.append(
                Row(
                    op_of(args),
                    variant,
                    "eval",
                    metric,
                    unit,
                    "sampler",
                    sampler,
                    *quantiles(values),
                    *tail,
                    said,
                )
            )
    rows += curve_rows(args, variant, outs, (*tail, note))
    for metric, unit, key in (("time", "s", "seconds"), ("peak memory", "MiB", "peak_mib")):
        values = [result[key] for result in results]
        rows.append(
            Row(op_of(args), variant, "train", metric, unit, "seeds", "all", *quantiles(values), *tail, note)
        )
    return rows


def curve_rows(args: argparse.Namespace, variant: str, outs: list[Path], tail: tuple) -> list[Row]:
    """Accuracy on the test images whenever a training evaluated itself."""
    points: dict[int, list[float]] = {}
    for out in outs:
        last = result_of(out)["iterations"]
        # The line of the last evaluation has the iteration that would come next.
        seen_at = {min(line["iteration"] + 1, last): line for line in read_metrics(out / METRICS_FILE)
                   if "accuracy" in line}  # fmt: skip
        for iteration, line in seen_at.items():
            points.setdefault(iteration, []).append(line["accuracy"])
    return [
        Row(op_of(args), variant, "curve", "accuracy", "%", "iteration", str(at), *quantiles(values), *tail)
        for at, values in sorted(points.items())
    ]


def draw(name: str) -> Path:
    """The curves of all variants that the file of results has."""
    rows = [row for row in load_rows(name) if row.metric == "accuracy"]
    curves = {variant: line_of([row for row in rows if row.provider == variant and row.mode == "curve"])
              for variant in dict.fromkeys(row.provider for row in rows if row.mode == "curve")}  # fmt: skip
    title = f"{name.removeprefix('classification_')}: accuracy on the test images, {rows[0].device}"
    return draw_panels(RESULTS / f"{name}.png", title, {"training": ("iteration", curves)})


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tune", action="store_true")
    args = arguments.parse_args()
    variants = args.variants or list(VARIANTS)
    rates, tuning = tuned_rates(args, variants)
    # Saving a variant's rows replaces its older ones: those of a tuning are saved with what it was for.
    rows = [row for row in tuning if row.provider in variants]
    for variant in variants:
        more = ["SOLVER.BASE_LR", rates[variant]]
        outs = [trained(args, variant, seed, more=more) for seed in range(args.seeds)]
        rows += rows_of(args, variant, outs)
    name = f"classification_{op_of(args)}"
    print(save_rows(name, rows))
    print(draw(name))


if __name__ == "__main__":
    main()
