"""Detections painted on an image itself, at its own resolution."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from dfm_d2.visualize.figures import class_color

if TYPE_CHECKING:
    from dfm_d2.framework import Instances


def paint_detections(
    image: np.ndarray, instances: "Instances", class_names: Sequence[str], score_thresh: float = 0.3
) -> np.ndarray:
    """A copy of `image`, uint8 RGB `(H, W, 3)`, with the detections of at least `score_thresh` on it."""
    canvas = image.copy(order="C")
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
