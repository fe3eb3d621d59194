#!/usr/bin/env python
"""Accuracy on corrupted test images: Gaussian noise, blur, occlusion and JPEG at several severities.

python benchmarks/robustness.py --config configs/digits_flow_cnn.yaml

Of flow with K = 1, 4, 16 steps and M = 1, 8 noise samples, and of backprop: the trainings of
benchmarks/classification.py, made here where they are not there. Corruptions are seeded by image.
"""

import io

import cv2
import numpy as np
import torch
from class_figures import draw_panels
from class_runs import (
    accuracy,
    accuracy_of,
    batches,
    load,
    op_of,
    parser,
    result_of,
    sampled,
    seen,
    trained,
)
from PIL import Image
from rows import RESULTS, Row, quantiles, save_rows

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


def accuracies(model, loader: list[list[dict]]) -> dict[str, float]:
    """{sampler: percent}; a model without a flow has one answer, "eval"."""
    if not hasattr(model, "sampler"):
        return {"eval": accuracy(model, loader)}
    images = seen(model, loader)
    return {
        name: accuracy_of(sampled(model, images, **changes), images.labels)
        for name, changes in SAMPLERS.items()
    }


def panels_of(rows: list[Row]) -> dict:
    """One panel a corruption, from clean images to the greatest severity."""
    named = {(row.provider, row.mode, row.x_name, row.x_value): row for row in rows}
    models = dict.fromkeys((row.provider, row.mode) for row in rows)
    panels = {}
    for kind, severities in SEVERITIES.items():
        lines = {}
        for provider, mode in models:
            steps = [("clean", "0"), *((kind, f"{severity:g}") for severity in severities)]
            points = [(level, named[(provider, mode) + step]) for level, step in enumerate(steps)]
            name = provider if mode == "eval" else f"{provider}, {mode}"
            lines[name] = [(level, row.p20, row.p50, row.p80) for level, row in points]
        panels[f"{kind}: {', '.join(f'{severity:g}' for severity in severities)}"] = (
            "severity (0: clean)",
            lines,
        )
    return panels


def main() -> None:
    args = parser(__doc__).parse_args()
    found: dict[tuple, list[float]] = {}
    cases = [("clean", 0.0)] + [(kind, s) for kind, severities in SEVERITIES.items() for s in severities]
    for variant in args.variants or ["flow", "backprop"]:
        for seed in range(args.seeds):
            out = trained(args, variant, seed, any_rate=True)
            cfg, model = load(out)
            clean = batches(cfg, cfg.DATASETS.TEST[0])
            for kind, severity in cases:
                test = clean if kind == "clean" else corrupted_batches(clean, kind, severity)
                for name, value in accuracies(model, test).items():
                    found.setdefault((variant, name, kind, severity), []).append(value)
    rows, first = [], result_of(out)
    for (variant, name, kind, severity), values in found.items():
        rows.append(
            Row(op_of(args), variant, name, "accuracy", "%", kind, f"{severity:g}",
                *quantiles(values), first["device"], torch.__version__, first["commit"],
                f"seeds 0-{args.seeds - 1}")
        )  # fmt: skip
    print(save_rows(f"robustness_{op_of(args)}", rows))
    title = f"{op_of(args)}: corrupted test images, {rows[0].note}"
    print(draw_panels(RESULTS / f"robustness_{op_of(args)}.png", title, panels_of(rows)))


if __name__ == "__main__":
    main()
