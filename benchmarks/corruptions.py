"""Corrupted test images: Gaussian noise, blur, occlusion and JPEG at several severities, and the picture of
what they cost. Seeded by image."""

import io
from collections.abc import Iterable

import cv2
import numpy as np
import torch
from harness import RESULTS, Row, draw_panels, lines_of, load_rows
from PIL import Image

from dfm_d2.flow import stream_key
from dfm_d2.framework import CfgNode

# Severities of each: standard deviation (of 255), that of the blur in shares of the shorter side, side of the
# occluding square in shares of it, JPEG quality.
SEVERITIES = {
    "noise": (25, 50, 100),
    "blur": (0.05, 0.1, 0.2),
    "occlusion": (0.25, 0.375, 0.5),
    "jpeg": (50, 20, 5),
}
# (kind, severity)
CASES = [("clean", 0.0), *((kind, s) for kind, severities in SEVERITIES.items() for s in severities)]


def corrupted(image: np.ndarray, kind: str, severity: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, C) to the same; colours are RGB."""
    height, width = image.shape[:2]
    if kind == "noise":
        return (image + rng.normal(0, severity, image.shape)).clip(0, 255).astype(np.uint8)
    if kind == "blur":
        return cv2.GaussianBlur(image, (0, 0), severity * min(height, width)).reshape(image.shape)
    if kind == "occlusion":
        side = round(severity * min(height, width))
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        image = image.copy()
        image[top : top + side, left : left + side] = 0
        return image
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=int(severity))
    return np.asarray(Image.open(file)).reshape(image.shape)


def corrupted_batches(
    cfg: CfgNode, loader: Iterable[list[dict]], kind: str, severity: float
) -> list[list[dict]]:
    """The batches with every image corrupted, by a generator of the image's id; unchanged for "clean"."""
    # JPEG keeps less of some colours: it must know which is which.
    order, changed = -1 if cfg.INPUT.FORMAT == "BGR" else 1, []
    for batch in loader:
        changed.append([])
        for item in batch:
            if kind != "clean":
                rng = np.random.default_rng(abs(stream_key(kind, str(severity), item["image_id"])))
                rgb = np.ascontiguousarray(item["image"].numpy().transpose(1, 2, 0)[..., ::order])
                image = corrupted(rgb, kind, severity, rng)[..., ::order]
                item = item | {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}
            changed[-1].append(item)
    return changed


def panels_of(rows: list[Row]) -> dict[str, tuple[str, dict]]:
    """One panel a corruption, from clean images to the greatest severity, as `draw_panels` takes them."""
    panels = {}
    for kind, severities in SEVERITIES.items():
        levels = {("clean", "0"): 0} | {(kind, f"{s:g}"): level for level, s in enumerate(severities, 1)}
        places = [(row, levels.get((row.x_name, row.x_value))) for row in rows]
        seen_at = [row._replace(x_value=str(level)) for row, level in places if level is not None]
        lines = lines_of(seen_at, lambda row: f"{row.provider}, {row.mode}".removesuffix(", eval"))
        panels[f"{kind}: {', '.join(f'{s:g}' for s in severities)}"] = ("severity (0: clean)", lines)
    return panels


def draw_curves(name: str, title: str, metric: str) -> None:
    """Draw benchmarks/results/<name>.png, of the metric (in percent) in the saved rows of that name."""
    rows = [row for row in load_rows(name) if row.metric == metric]
    print(draw_panels(RESULTS / f"{name}.png", title, f"{metric} (%)", panels_of(rows)))
