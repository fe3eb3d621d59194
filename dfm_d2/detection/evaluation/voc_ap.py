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

Legend: G ground truths of one class in one image, M detections of one class in all images.
"""

from collections.abc import Hashable, Sequence

import numpy as np

_THRESHOLD = 0.5
# Boxes xyxy (G, 4) and whether each is difficult, bool (G,).
Truth = tuple[np.ndarray, np.ndarray]


def match_detections(
    truths: dict[Hashable, Truth], image_ids: Sequence[Hashable], scores: np.ndarray, boxes_xyxy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each detection, in order of falling score, is a true and whether it is a false positive.

    truths: of the images that have any of this class. image_ids, scores (M,), boxes_xyxy (M, 4): detections.
    Returns two bool arrays (M,).
    """
    taken = {image_id: np.zeros(len(difficult), bool) for image_id, (_, difficult) in truths.items()}
    order = np.argsort(-scores, kind="stable")
    true_positive, false_positive = np.zeros(len(order), bool), np.zeros(len(order), bool)
    for rank, detection in enumerate(order):
        image_id = image_ids[detection]
        if image_id not in truths:
            false_positive[rank] = True
            continue
        boxes, difficult = truths[image_id]
        overlaps = box_iou(boxes_xyxy[detection], boxes)
        best = int(overlaps.argmax())
        if overlaps[best] < _THRESHOLD:
            false_positive[rank] = True
        elif not difficult[best]:
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


def average_precisions(
    true_positive: np.ndarray, false_positive: np.ndarray, positives: int
) -> tuple[float, float]:
    """(11-point AP, area AP) in [0, 1] of what `match_detections` returns; NaN without positives."""
    if positives == 0:
        return float("nan"), float("nan")
    hits, misses = np.cumsum(true_positive), np.cumsum(false_positive)
    recall = hits / positives
    precision = hits / np.maximum(hits + misses, 1)
    # Compared without a tolerance, as everybody's numbers are: 3 x 0.1 is a little more than 0.3.
    best = [precision[recall >= point].max(initial=0.0) for point in np.linspace(0.0, 1.0, 11)]
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.mean(best)), float((np.diff(recall, prepend=0.0) * envelope).sum())
