"""The score of a detector that finds the same boxes in every image: the floor that a data set has."""

from collections.abc import Callable

import numpy as np

from dfm_d2.detection.evaluation.coco_ap import coco_average_precisions, coco_ground_truth
from dfm_d2.detection.evaluation.evaluator import make_categories


def constant_box_baseline(
    train: list[dict], test: list[dict], classes: list[str]
) -> tuple[str, float, float]:
    """Best of a few constant sets of boxes, made from the training boxes, on the test images.

    Each has, for every class, the same boxes in all images (relative to the image's size), with the
    frequency of the class as their score. Returns (which one, AP50, AP) in percent.
    """
    boxes, labels = _relative_boxes(train)
    frequency = np.bincount(labels, minlength=len(classes)) / max(len(labels), 1)
    categories = make_categories(classes, None)
    ground_truth = coco_ground_truth(test, categories)
    best = ("none", -1.0, -1.0)
    for name, rule in _rules(boxes, labels).items():
        detections = [
            {
                "image_id": entry["image_id"],
                "category_id": category["id"],
                "bbox": [
                    (cx - w / 2) * entry["width"],
                    (cy - h / 2) * entry["height"],
                    w * entry["width"],
                    h * entry["height"],
                ],
                "score": float(frequency[label]),
            }
            for entry in test
            for label, category in enumerate(categories)
            if frequency[label] > 0
            for cx, cy, w, h in rule(label).tolist()
        ]
        metrics = coco_average_precisions(ground_truth, detections)
        if metrics["AP50"] > best[1]:
            best = (name, metrics["AP50"], metrics["AP"])
    return best


def _rules(boxes: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[int], np.ndarray]]:
    """Named sets of boxes: class index -> boxes (M, 4), cxcywh relative to the image."""
    mean = boxes.mean(axis=0)
    centres = (np.arange(4) + 0.5) / 4
    grid = np.array([[x, y, mean[2], mean[3]] for y in centres for x in centres])
    return {
        "mean box of each class": lambda label: boxes[labels == label].mean(axis=0, keepdims=True),
        "mean box": lambda label: mean[None],
        "median box": lambda label: np.median(boxes, axis=0)[None],
        "centred box of half the side": lambda label: np.full((1, 4), 0.5),
        "whole image": lambda label: np.array([[0.5, 0.5, 1.0, 1.0]]),
        "4 x 4 grid of mean boxes": lambda label: grid,
    }


def _relative_boxes(dicts: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """All boxes as cxcywh relative to their image's size, (M, 4), and their class indices, (M,)."""
    rows = [
        (*target["bbox"], entry["width"], entry["height"], target["category_id"])
        for entry in dicts
        for target in entry["annotations"]
    ]
    x0, y0, x1, y1, width, height, labels = np.array(rows, dtype=np.float64).reshape(-1, 7).T
    boxes = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
    return np.stack(boxes, axis=1), labels.astype(np.int64)
