#!/usr/bin/env python
"""Accuracy of classifiers on corrupted test images: Gaussian noise, blur, occlusion, JPEG.

python benchmarks/robustness.py --config configs/digits_flow_cnn.yaml --save

Of flow with M = 1, 8 noise samples, and of backprop: the trainings of
benchmarks/classification.py, made here where they are not there. Corruptions are seeded by image.
"""

import sys
from functools import partial
from pathlib import Path

from classification import STUDY, accuracy, labels_of, probabilities, sampled
from corruptions import CASES, corrupted_batches, draw_curves
from harness import reported
from runs import Key, op_of

from dfm_d2.classification.data.loader import build_class_test_loader
from dfm_d2.errors import exit_status

SAMPLERS = {f"M={m}": {"samples": m} for m in (1, 8)}


def scores_of(variant: str, out: Path) -> dict[Key, float]:
    """Of every corruption by every sampler; a model without a flow has one answer, "eval"."""
    cfg, model = STUDY.load(out)
    clean, scores = list(build_class_test_loader(cfg, cfg.DATASETS.TEST[0])), {}
    labels = labels_of(clean)
    for kind, severity in CASES:
        test = corrupted_batches(cfg, clean, kind, severity)
        is_flow = hasattr(model, "sampler")
        found = sampled(model, test, SAMPLERS) if is_flow else {"eval": probabilities(model, test)}
        for name, probs in found.items():
            scores[variant, name, "accuracy", "%", kind, f"{severity:g}"] = accuracy(probs, labels)
    return scores


def main() -> None:
    args, rows = STUDY.parser(__doc__).parse_args(), []
    for variant in args.variants or ["flow", "backprop"]:
        rows += STUDY.rows(args, variant, partial(scores_of, variant), any_rate=True)
    name = f"robustness_{op_of(args)}"
    reported(rows, args.save and name)
    if args.save:
        draw_curves(name, f"{op_of(args)}: corrupted test images", "accuracy")


if __name__ == "__main__":
    sys.exit(exit_status(main))
