"""PASCAL VOC average precision: 11 points (VOC 2007) and area under the curve (VOC 2010 and later).

For one class at an IoU threshold, detections of all images in order of falling score are each matched to
the ground truth of their image with the largest IoU (difficult ones included):

    IoU < threshold, or no ground truth   ->  false positive
    difficult ground truth                ->  ignored
    ground truth not yet taken            ->  true positive, which takes it
    ground truth taken already            ->  false positive (a duplicate)

With r = TP / positives and p = TP / (TP + FP) after each detection (positives: all that is not difficult),

    AP_07   = 1/11 sum_{t in {0, 0.1, ..., 1}} max_{r >= t} p
    AP_area = sum over steps of r of (r_i - r_{i-1}) max_{j >= i} p_j

Boxes: the development kit counts pixels from 1 with xmax inside, so its sides are xmax - xmin + 1; ours are
half-open with x0 = xmin - 1, so x1 - x0 is the same number and both IoUs agree. An IoU equal to the threshold
matches, as in the kit and in COCO (Detectron2's copy of the kit wants it greater).

Legend: G ground truths, M detections.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np


@dataclass
class ClassGroundTruth:
    """Ground truth of one class in one image: boxes_xyxy (G, 4), difficult bool (G,)."""

    boxes_xyxy: np.ndarray
    difficult: np.ndarray


@dataclass
class ClassDetections:
    """Detections of one class in all images: image_ids (M,), scores (M,), boxes_xyxy (M, 4)."""

    image_ids: list[Hashable]
    scores: np.ndarray
    boxes_xyxy: np.ndarray


def match_detections(
    ground_truth: dict[Hashable, ClassGroundTruth], detections: ClassDetections, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each detection, in order of falling score, is a true and whether it is a false positive.

    Images without an entry in `ground_truth` have none of this class. Returns two bool arrays (M,).
    """
    taken = {image_id: np.zeros(len(truth.difficult), bool) for image_id, truth in ground_truth.items()}
    order = np.argsort(-detections.scores, kind="stable")
    true_positive, false_positive = np.zeros(len(order), bool), np.zeros(len(order), bool)
    for rank, detection in enumerate(order):
        image_id = detections.image_ids[detection]
        truth = ground_truth.get(image_id)
        if truth is None or len(truth.difficult) == 0:
            false_positive[rank] = True
            continue
        overlaps = box_iou(detections.boxes_xyxy[detection], truth.boxes_xyxy)
        best = int(overlaps.argmax())
        if overlaps[best] < threshold:
            false_positive[rank] = True
        elif not truth.difficult[best]:
            true_positive[rank] = not taken[image_id][best]
            false_positive[rank] = taken[image_id][best]
            taken[image_id][best] = True
    return true_positive, false_positive


def box_iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of one box (4,) with boxes (G, 4), both xyxy half-open; (G,)."""
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    intersection = np.clip(high - low, 0.0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - intersection
    return intersection / np.maximum(union, np.finfo(np.float64).eps)


def average_precision(
    true_positive: np.ndarray, false_positive: np.ndarray, positives: int, eleven_points: bool
) -> float:
    """AP in [0, 1] from what `match_detections` answers; NaN if the class has no positives."""
    if positives == 0:
        return float("nan")
    hits, misses = np.cumsum(true_positive), np.cumsum(false_positive)
    recall = hits / positives
    precision = hits / np.maximum(hits + misses, 1)
    if eleven_points:
        points = np.linspace(0.0, 1.0, 11)
        # Compared without a tolerance, as everybody's numbers are: 3 x 0.1 is a little more than 0.3.
        best = [precision[recall >= point].max(initial=0.0) for point in points]
        return float(np.mean(best))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def voc_average_precisions(
    ground_truth: dict[Hashable, ClassGroundTruth], detections: ClassDetections, threshold: float = 0.5
) -> tuple[float, float]:
    """(11-point AP, area AP) of one class, each in [0, 1] or NaN without positives."""
    true_positive, false_positive = match_detections(ground_truth, detections, threshold)
    positives = sum(int((~truth.difficult).sum()) for truth in ground_truth.values())
    return (
        average_precision(true_positive, false_positive, positives, eleven_points=True),
        average_precision(true_positive, false_positive, positives, eleven_points=False),
    )
