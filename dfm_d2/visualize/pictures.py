"""Pictures: ground truth beside detections, and boxes on their way from noise to the answer.

Shapes: B images, N proposals, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from dfm_d2.framework import Instances  # noqa: E402
from dfm_d2.visualize.labels import place_labels  # noqa: E402
from dfm_d2.visualize.record import FlowRecord  # noqa: E402

_PALETTE = plt.get_cmap("tab10").colors + plt.get_cmap("Dark2").colors
_PREDICTORS = plt.get_cmap("Set1").colors[:5] + plt.get_cmap("tab20b").colors[::4]
# Inches a panel.
_PANEL = 2.3


def class_color(index: int) -> tuple[float, float, float]:
    """The colour of a class, the same in every picture."""
    return _PALETTE[index % len(_PALETTE)]


def predictor_color(index: int) -> tuple[float, float, float]:
    """The colour of a predictor, the same in every picture."""
    return _PREDICTORS[index % len(_PREDICTORS)]


def draw_box(axes: Axes, box_xyxy: Sequence[float], color, label: str = "", alpha: float = 1.0) -> None:
    """One pixel box on axes that show an image."""
    x0, y0, x1, y1 = (float(value) for value in box_xyxy)
    axes.add_patch(
        Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.4, alpha=alpha)
    )
    if label:
        box_style = {"facecolor": color, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        axes.text(x0, y0, label, fontsize=5.5, color="white", va="bottom", bbox=box_style, clip_on=True)


def _show(axes: Axes, image: np.ndarray, title: str = "") -> None:
    axes.imshow(image)
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)


def _count(number: int) -> str:
    return "1 detection" if number == 1 else f"{number} detections"


def save_figure(figure, path: str | Path) -> Path:
    """Write and close a figure; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path


def draw_predictions(
    path: str | Path,
    images: Sequence[np.ndarray],
    truths: Sequence[Sequence[tuple[Sequence[float], int]]],
    detections: Sequence[Instances],
    class_names: Sequence[str],
    score_thresh: float = 0.3,
) -> Path:
    """Ground truth (upper row) beside detections above `score_thresh` (lower row), one column an image.

    Args:
        images: uint8 RGB `(H, W, 3)`. truths: pairs of pixel box and class. detections: in the same pixels.

    Returns:
        The path written.
    """
    columns = max(len(images), 1)
    figure, axes = plt.subplots(
        2, columns, figsize=(_PANEL * columns, 2 * _PANEL), squeeze=False, layout="constrained"
    )
    for column, (image, truth, found) in enumerate(zip(images, truths, detections)):
        _show(axes[0, column], image, "ground truth")
        for box, label in truth:
            draw_box(axes[0, column], box, class_color(label), class_names[label])
        sure = found[found.scores >= score_thresh]
        _show(axes[1, column], image, _count(len(sure)))
        for box, score, label in zip(sure.pred_boxes.tensor, sure.scores, sure.pred_classes):
            text = f"{class_names[int(label)]} {float(score):.2f}"
            draw_box(axes[1, column], box, class_color(int(label)), text)
    figure.suptitle(f"ground truth, and detections with a score of at least {score_thresh}", fontsize=9)
    place_labels(figure)
    return save_figure(figure, path)


def draw_flow(
    path: str | Path,
    record: FlowRecord,
    image: np.ndarray,
    class_names: Sequence[str],
    score_thresh: float = 0.3,
    color_by: str = "class",
) -> Path:
    """Every proposal of one image at every time of the solver's grid, then what is left after NMS.

    Boxes are as opaque as their score; grey ones end as background.

    Args:
        image: uint8 RGB `(H, W, 3)` of the original size.
        color_by: "class" (that a box ends as) or "predictor" (that moves it next).

    Returns:
        The path written.
    """
    panels = len(record.states) + 1
    columns = min(panels, 6)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(_PANEL * columns, _PANEL * rows), squeeze=False, layout="constrained"
    )
    for empty in axes.flat[panels:]:
        empty.axis("off")
    height, width = image.shape[:2]
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    for place, (t, boxes) in enumerate(zip(record.times, record.states)):
        panel = axes.flat[place]
        # What a box ends as, or how sure its predictor is of it now.
        step = record.step_of(place) if color_by == "predictor" else -1
        scores, classes, leaders = record.scores[step], record.classes[step], record.leader(place)
        moved = sorted({answer.predictor for answer in record.answers[record.step_of(place)]})
        note = " (noise)" if place == 0 else ""
        note += f", {' '.join(f'p{d}' for d in moved)}" if color_by == "predictor" else ""
        _show(panel, image, f"t = {t:.4g}{note}")
        boxes_xyxy = torch.minimum(boxes.clamp(min=0), limits)
        # Faint ones first, so that what matters lies on top.
        for n in scores.argsort().tolist():
            sure = scores[n] >= score_thresh
            known = class_color(int(classes[n])) if color_by == "class" else predictor_color(int(leaders[n]))
            draw_box(
                panel,
                boxes_xyxy[n],
                known if sure else (0.6, 0.6, 0.6),
                alpha=float(scores[n].clamp(0.15, 1)),
            )
    last = axes.flat[panels - 1]
    sure = record.detections[record.detections.scores >= score_thresh]
    _show(last, image, _count(len(sure)))
    for box, score, label in zip(sure.pred_boxes.tensor, sure.scores, sure.pred_classes):
        draw_box(last, box, class_color(int(label)), f"{class_names[int(label)]} {float(score):.2f}")
    place_labels(figure)
    return save_figure(figure, path)


def paint_detections(
    image: np.ndarray, instances: Instances, class_names: Sequence[str], score_thresh: float = 0.3
) -> np.ndarray:
    """A copy of `image` with the detections of at least `score_thresh` on it, at its own resolution.

    Args:
        image: uint8 RGB `(H, W, 3)`. instances: in the same pixels.
    """
    canvas = np.ascontiguousarray(image)
    canvas = canvas.copy() if canvas is image else canvas
    side = min(image.shape[:2])
    line, scale = max(1, round(side / 250)), max(0.4, side / 900)
    sure = instances[instances.scores >= score_thresh]
    # The surest last, so that it lies on top.
    for n in sure.scores.argsort().tolist():
        label = int(sure.pred_classes[n])
        color = tuple(int(255 * part) for part in class_color(label))
        x0, y0, x1, y1 = (round(v) for v in sure.pred_boxes.tensor[n].tolist())
        cv2.rectangle(canvas, (x0, y0), (x1, y1), color, line, cv2.LINE_AA)
        text = f"{class_names[label]} {float(sure.scores[n]):.2f}"
        (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        # Above the box, or inside of it at the upper edge of the image.
        top = max(y0 - height - base, 0)
        cv2.rectangle(canvas, (x0, top), (x0 + width, top + height + base), color, cv2.FILLED)
        place = (x0, top + height)
        cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return canvas
