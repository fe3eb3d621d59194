#!/usr/bin/env python
"""Accuracy on corrupted test images: Gaussian noise, blur, occlusion and JPEG at several severities.

python benchmarks/robustness.py --config configs/digits_flow_cnn.yaml --save

Of flow with K = 1, 4, 16 steps and M = 1, 8 noise samples, and of backprop: the trainings of
benchmarks/classification.py, made here where they are not there. Corruptions are seeded by image.
"""

import io
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from classification import STUDY, accuracy, labels_of, probabilities, sampled
from harness import RESULTS, Line, Row, draw_panels, lines_of, reported
from PIL import Image
from runs import Key, op_of

from dfm_d2.classification.data.loader import build_class_test_loader
from dfm_d2.errors import exit_status
from dfm_d2.flow import stream_key

# Severities of each: standard deviation (of 255), that of the blur in shares of the side, side of the
# occluding square in shares of the image's, JPEG quality.
SEVERITIES = {
    "noise": (25, 50, 100),
    "blur": (0.05, 0.1, 0.2),
    "occlusion": (0.25, 0.375, 0.5),
    "jpeg": (50, 20, 5),
}
SAMPLERS = {f"K={k}, M={m}": {"steps": k, "samples": m} for k in (1, 4, 16) for m in (1, 8)}


def corrupted(image: np.ndarray, kind: str, severity: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, C) to the same."""
    height, width = image.shape[:2]
    if kind == "noise":
        return (image + rng.normal(0, severity, image.shape)).clip(0, 255).astype(np.uint8)
    if kind == "blur":
        return cv2.GaussianBlur(image, (0, 0), severity * height).reshape(image.shape)
    if kind == "occlusion":
        side = round(severity * height)
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        image = image.copy()
        image[top : top + side, left : left + side] = 0
        return image
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=int(severity))
    return np.asarray(Image.open(file)).reshape(image.shape)


def corrupted_batches(loader: list[list[dict]], kind: str, severity: float) -> list[list[dict]]:
    """The batches with every image corrupted, by a generator of the image's id."""
    changed = []
    for batch in loader:
        changed.append([])
        for item in batch:
            rng = np.random.default_rng(abs(stream_key(kind, str(severity), item["image_id"])))
            image = corrupted(item["image"].numpy().transpose(1, 2, 0), kind, severity, rng)
            changed[-1].append(item | {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())})
    return changed


def scores_of(variant: str, out: Path) -> dict[Key, float]:
    """Of every corruption by every sampler; a model without a flow has one answer, "eval"."""
    cfg, model = STUDY.load(out)
    clean, scores = list(build_class_test_loader(cfg, cfg.DATASETS.TEST[0])), {}
    labels = labels_of(clean)
    cases = [("clean", 0.0)] + [(kind, s) for kind, severities in SEVERITIES.items() for s in severities]
    for kind, severity in cases:
        test = clean if kind == "clean" else corrupted_batches(clean, kind, severity)
        is_flow = hasattr(model, "sampler")
        found = sampled(model, test, SAMPLERS) if is_flow else {"eval": probabilities(model, test)}
        for name, probs in found.items():
            scores[variant, name, "accuracy", "%", kind, f"{severity:g}"] = accuracy(probs, labels)
    return scores


def panels_of(rows: list[Row]) -> dict[str, tuple[str, dict[str, Line]]]:
    """One panel a corruption, from clean images to the greatest severity."""
    panels = {}
    for kind, severities in SEVERITIES.items():
        levels = {("clean", "0"): 0} | {(kind, f"{s:g}"): level for level, s in enumerate(severities, 1)}
        places = [(row, levels.get((row.x_name, row.x_value))) for row in rows]
        seen_at = [row._replace(x_value=str(level)) for row, level in places if level is not None]
        lines = lines_of(seen_at, lambda row: f"{row.provider}, {row.mode}".removesuffix(", eval"))
        panels[f"{kind}: {', '.join(f'{s:g}' for s in severities)}"] = ("severity (0: clean)", lines)
    return panels


def main() -> None:
    args, rows = STUDY.parser(__doc__).parse_args(), []
    for variant in args.variants or ["flow", "backprop"]:
        rows += STUDY.rows(args, variant, partial(scores_of, variant), any_rate=True)
    name = f"robustness_{op_of(args)}"
    reported(rows, args.save and name)
    title = f"{op_of(args)}: corrupted test images"
    if args.save:
        print(draw_panels(RESULTS / f"{name}.png", title, "accuracy (%)", panels_of(rows)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
