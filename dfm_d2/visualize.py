"""Pictures: ground truth beside detections, and boxes on their way from noise to the answer.

Shapes: B images, N proposals, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from dfm_d2.framework import Instances  # noqa: E402
from dfm_d2.modeling.detector import FlowDetector  # noqa: E402

_PALETTE = plt.get_cmap("tab10").colors + plt.get_cmap("Dark2").colors
# Inches a panel.
_PANEL = 2.3


def class_color(index: int) -> tuple[float, float, float]:
    """The colour of a class, the same in every picture."""
    return _PALETTE[index % len(_PALETTE)]


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
    """Write a figure, make its folder if need be, and close it."""
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
    return save_figure(figure, path)


def draw_flow(
    path: str | Path,
    model: FlowDetector,
    item: dict,
    image: np.ndarray,
    class_names: Sequence[str],
    score_thresh: float = 0.3,
) -> Path:
    """Every proposal of one image at every time of the solver's grid, then what is left after NMS.

    A box has the colour of the class it ends as, and is as opaque as its score; grey ends as background.

    Args:
        item: the model's input dict. image: uint8 RGB `(H, W, 3)` of the original size.

    Returns:
        The path written.
    """
    trajectory, _ = model.trajectory([item])
    detections = model.inference([item])[0]["instances"].to("cpu")
    size = torch.tensor([image.shape[:2]], dtype=torch.float32)
    scores, classes = trajectory.last.info.class_probs[0].cpu().max(-1)
    panels = len(trajectory.states) + 1
    columns = min(panels, 6)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(_PANEL * columns, _PANEL * rows), squeeze=False, layout="constrained"
    )
    for empty in axes.flat[panels:]:
        empty.axis("off")
    for place, (t, x_t) in enumerate(zip(trajectory.times, trajectory.states)):
        panel = axes.flat[place]
        _show(panel, image, f"t = {t:.4g}" + (" (noise)" if place == 0 else ""))
        boxes_xyxy = model.space.proposals(x_t.cpu(), size)[0]
        # Faint ones first, so that what matters lies on top.
        for n in scores.argsort().tolist():
            sure = scores[n] >= score_thresh
            color = class_color(int(classes[n])) if sure else (0.6, 0.6, 0.6)
            draw_box(panel, boxes_xyxy[n], color, alpha=float(scores[n].clamp(0.15, 1)))
    last = axes.flat[panels - 1]
    sure = detections[detections.scores >= score_thresh]
    _show(last, image, _count(len(sure)))
    for box, score, label in zip(sure.pred_boxes.tensor, sure.scores, sure.pred_classes):
        draw_box(last, box, class_color(int(label)), f"{class_names[int(label)]} {float(score):.2f}")
    return save_figure(figure, path)
