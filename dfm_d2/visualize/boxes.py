"""Boxes on images: ground truth beside detections, and boxes on their way from noise to the answer.

Shapes: N proposals, K solver steps, M field points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import Tensor

from dfm_d2.framework import Instances
from dfm_d2.visualize.figures import class_color, plt, save_figure

# Places to try for a label, in its heights from its place above the box: inside, then further up and down.
_SHIFTS = (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5)


class Answer(NamedTuple):
    """What one predictor answers to one state: endpoints (N, 4) pixels, its best class and score (N,)."""

    predictor: int
    endpoints_xyxy: Tensor
    classes: Tensor
    scores: Tensor


@dataclass
class FlowRecord:
    """All boxes are xyxy in pixels of the original image, on the CPU, not clipped to it.

    times: K + 1 numbers. states: K + 1 tensors `(N, 4)`. answers: of each of K steps, those who answered.
    classes, scores: K tensors `(N,)`, the averaged answer of each step. detections: after NMS.
    followed: index of the box whose field was computed.
    field_points: `(M, 2)` centres in pixels. field: K tensors `(M, 2)`: where the followed box's centre would
    be heading from there, in pixels until t = 1 (velocity times the time that is left).
    """

    times: tuple[float, ...]
    states: list[Tensor]
    answers: list[list[Answer]]
    classes: list[Tensor]
    scores: list[Tensor]
    detections: Instances
    followed: int
    field_points: Tensor
    field: list[Tensor]

    def leader(self, k: int) -> Tensor:
        """`(N,)` index of the most confident predictor of each box in step `k`."""
        best = torch.stack([answer.scores for answer in self.answers[k]]).argmax(0)
        return torch.tensor([answer.predictor for answer in self.answers[k]])[best]


def draw_predictions(
    path: str | Path,
    images: Sequence[np.ndarray],
    truths: Sequence[Sequence[tuple[Sequence[float], int]]],
    detections: Sequence[Instances],
    class_names: Sequence[str],
    score_thresh: float,
) -> Path:
    """Ground truth, where there is any (upper row), and detections above `score_thresh`, one column an image.

    images: uint8 RGB `(H, W, 3)`. truths: pairs of pixel box and class. detections: in the same pixels.
    Returns the path written.
    """
    known = any(map(len, truths))
    figure, axes = _panels(1 + known, max(len(images), 1))
    for column, image, truth, found in zip(axes.T, images, truths, detections):
        _show_detections(column[-1], image, found, class_names, score_thresh)
        if known:
            _show(column[0], image, "ground truth")
        for box, label in truth:
            draw_box(column[0], box, class_color(label), class_names[label])
    said = f"{'ground truth, and ' * known}detections with a score of at least {score_thresh:.2g}"
    figure.suptitle(said, fontsize=9)
    place_labels(figure)
    return save_figure(figure, path)


def draw_sheet(
    path: str | Path,
    pictures: Sequence[tuple[np.ndarray, Sequence[tuple[Sequence[float], int]]]],
    class_names: Sequence[str],
) -> Path:
    """Images in three columns, each with its ground truth, as in draw_predictions. Returns the path."""
    figure, axes = _panels(max(-(-len(pictures) // 3), 1), 3)
    for panel in axes.flat:
        panel.axis("off")
    for panel, (image, truth) in zip(axes.flat, pictures):
        _show(panel, image)
        for box, label in truth:
            draw_box(panel, box, class_color(label), class_names[label])
    place_labels(figure)
    return save_figure(figure, path)


def draw_flow(
    path: str | Path, record: FlowRecord, image: np.ndarray, class_names: Sequence[str], score_thresh: float
) -> Path:
    """Every proposal of one image at every time of the solver's grid, then what is left after NMS.

    Boxes have the colour of the class that they end as, and are as opaque as their score; grey ones end as
    background. image: uint8 RGB `(H, W, 3)` of the original size. Returns the path written.
    """
    count = len(record.states) + 1
    columns = min(count, 6)
    shape = image.shape[0] / image.shape[1]
    figure, axes = _panels(-(-count // columns), columns, 2.1 * min(shape, 1) + 0.3)
    for empty in axes.flat[count:]:
        empty.axis("off")
    limits = torch.tensor([*image.shape[1::-1]] * 2, dtype=torch.float32)
    scores, classes = record.scores[-1], record.classes[-1]
    for panel, t, boxes in zip(axes.flat, record.times, record.states):
        _show(panel, image, f"t = {t:.4g}{' (noise)' if panel is axes.flat[0] else ''}")
        boxes_xyxy = torch.minimum(boxes.clamp(min=0), limits)
        # Faint ones first, so that what matters lies on top.
        for n in scores.argsort().tolist():
            color = class_color(int(classes[n])) if scores[n] >= score_thresh else (0.6, 0.6, 0.6)
            draw_box(panel, boxes_xyxy[n], color, alpha=float(scores[n].clamp(0.15, 1)))
    _show_detections(axes.flat[count - 1], image, record.detections, class_names, score_thresh)
    place_labels(figure)
    return save_figure(figure, path)


def _panels(rows: int, columns: int, height: float = 2.3) -> tuple[Figure, np.ndarray]:
    size = (2.3 * columns, height * rows)  # inches
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _show(axes: Axes, image: np.ndarray, title: str = "") -> None:
    axes.imshow(image)
    axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5), xticks=[], yticks=[])
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
    style = {"fill": False, "edgecolor": color, "linewidth": 1.4, "alpha": alpha}
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **style))
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
    label, picture = text.get_bbox_patch().get_window_extent(), panel.get_window_extent()
    # To the left where it would leave the picture.
    moved_x = min(picture.x1 - label.x1, 0)
    for shift in _SHIFTS:
        covered = label.translated(moved_x, shift * label.height)
        inside = covered.y0 >= picture.y0 - 0.5 and covered.y1 <= picture.y1 + 0.5
        if inside and not covered.padded(-0.5).count_overlaps(taken):  # half a pixel is rounding
            anchor = panel.transData.transform(text.get_position())
            moved = anchor + (moved_x, shift * label.height)
            text.set_position(panel.transData.inverted().transform(moved))
            return covered
    return label
