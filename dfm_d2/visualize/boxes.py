"""Boxes on images: ground truth beside detections, and boxes on their way from noise to the answer.

Shapes: N proposals.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from dfm_d2.framework import Instances
from dfm_d2.visualize.figures import class_color, plt, predictor_color, save_figure
from dfm_d2.visualize.record import FlowRecord

# Inches a panel.
_PANEL = 2.3
# Places to try for a label, in its heights from its place above the box: inside, then further up and down.
_SHIFTS = (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5)


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
    figure, axes = _panels(2, max(len(images), 1))
    for (above, below), image, truth, found in zip(axes.T, images, truths, detections):
        _show(above, image, "ground truth")
        for box, label in truth:
            draw_box(above, box, class_color(label), class_names[label])
        _show_detections(below, image, found, class_names, score_thresh)
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
    count = len(record.states) + 1
    columns = min(count, 6)
    figure, axes = _panels(-(-count // columns), columns)
    for empty in axes.flat[count:]:
        empty.axis("off")
    height, width = image.shape[:2]
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    by_predictor = color_by == "predictor"
    for place, (panel, t, boxes) in enumerate(zip(axes.flat, record.times, record.states)):
        # What a box ends as, or how sure its predictor is of it now.
        step = record.step_of(place) if by_predictor else -1
        scores, classes, leaders = record.scores[step], record.classes[step], record.leader(place)
        moved = sorted({answer.predictor for answer in record.answers[record.step_of(place)]})
        note = " (noise)" if place == 0 else ""
        note += f", {' '.join(f'p{d}' for d in moved)}" if by_predictor else ""
        _show(panel, image, f"t = {t:.4g}{note}")
        boxes_xyxy = torch.minimum(boxes.clamp(min=0), limits)
        # Faint ones first, so that what matters lies on top.
        for n in scores.argsort().tolist():
            known = predictor_color(int(leaders[n])) if by_predictor else class_color(int(classes[n]))
            color = known if scores[n] >= score_thresh else (0.6, 0.6, 0.6)
            draw_box(panel, boxes_xyxy[n], color, alpha=float(scores[n].clamp(0.15, 1)))
    _show_detections(axes.flat[count - 1], image, record.detections, class_names, score_thresh)
    place_labels(figure)
    return save_figure(figure, path)


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    size = (_PANEL * columns, _PANEL * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _show(axes: Axes, image: np.ndarray, title: str = "") -> None:
    axes.imshow(image)
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)


def _show_detections(
    axes: Axes, image: np.ndarray, found: Instances, class_names: Sequence[str], score_thresh: float
) -> None:
    sure = found[found.scores >= score_thresh]
    _show(axes, image, "1 detection" if len(sure) == 1 else f"{len(sure)} detections")
    for box, score, label in zip(sure.pred_boxes.tensor, sure.scores.tolist(), sure.pred_classes.tolist()):
        draw_box(axes, box, class_color(label), f"{class_names[label]} {score:.2f}")


def draw_box(axes: Axes, box_xyxy: Sequence[float], color, label: str = "", alpha: float = 1.0) -> None:
    """One pixel box on axes that show an image."""
    x0, y0, x1, y1 = (float(value) for value in box_xyxy)
    axes.add_patch(
        Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.4, alpha=alpha)
    )
    if label:
        box_style = {"facecolor": color, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        axes.text(x0, y0, label, fontsize=5.5, color="white", va="bottom", bbox=box_style, clip_on=True)


def place_labels(figure: Figure) -> None:
    """Shift the texts of every panel so that each is inside of its image and none covers another.

    Those that were drawn first keep their places if they can; a label with no free place stays where it is.
    """
    figure.draw_without_rendering()  # sizes are known only then
    for panel in figure.axes:
        taken: list[Bbox] = []
        for text in panel.texts:
            taken.append(_place(panel, text, taken))


def _place(panel: Axes, text: Text, taken: list[Bbox]) -> Bbox:
    """Move one label; returns what it covers, in pixels of the figure."""
    patch, picture = text.get_bbox_patch(), panel.get_window_extent()
    label = (patch or text).get_window_extent()
    # To the left where it would leave the picture.
    x = label.x0 + min(picture.x1 - label.x1, 0)
    for shift in _SHIFTS:
        covered = Bbox.from_bounds(x, label.y0 + shift * label.height, label.width, label.height)
        inside = covered.y0 >= picture.y0 - 0.5 and covered.y1 <= picture.y1 + 0.5
        if inside and not any(_overlap(covered, other) for other in taken):
            anchor = panel.transData.transform(text.get_position())
            moved = anchor + (covered.x0 - label.x0, covered.y0 - label.y0)
            text.set_position(panel.transData.inverted().transform(moved))
            return covered
    return label


def _overlap(a: Bbox, b: Bbox) -> bool:
    # Less than half a pixel is rounding.
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5
