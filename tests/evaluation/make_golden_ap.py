"""Make golden_ap.json: a tiny set, detections, and what the real Detectron2 measures of them.

Run it with Detectron2 importable: python tests/evaluation/make_golden_ap.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from detectron2_ap import measure
from golden_set import GOLDEN_PATH

CLASSES = ["cat", "dog", "cow"]


def make_set(rng):
    """8 images; detections are jittered objects, duplicates and pure noise, all scores different."""
    images, detections = [], []
    scores = iter(rng.permutation(np.arange(1, 1000)) / 1000)
    for number in range(8):
        width, height = (int(side) for side in rng.integers(150, 400, 2))
        objects = []
        for _ in range(int(rng.integers(0, 7)) if number else 0):  # the first image is empty
            x0, y0 = int(rng.integers(0, width - 30)), int(rng.integers(0, height - 30))
            x1, y1 = int(rng.integers(x0 + 12, width)), int(rng.integers(y0 + 12, height))
            objects.append([int(rng.integers(3)), x0, y0, x1, y1, int(rng.random() < 0.2)])
        name = f"{number:06d}"
        images.append({"image_id": name, "width": width, "height": height, "objects": objects})
        for label, *box, _ in objects:
            for _ in range(int(rng.integers(1, 3))):
                side = min(box[2] - box[0], box[3] - box[1])
                moved = np.array(box) + rng.normal(0, 0.12 * side, 4)
                detections.append(_row(name, label, next(scores), moved))
        for _ in range(3):
            corner = rng.uniform(0, 100, 2)
            noise = np.concatenate([corner, corner + rng.uniform(10, 50, 2)])
            detections.append(_row(name, int(rng.integers(3)), next(scores), noise))
    return {"classes": CLASSES, "images": images, "detections": detections}


def _row(name, label, score, box):
    # One decimal, as Detectron2's VOC evaluator writes boxes, and three for scores.
    low, high = np.maximum(box[:2], 0), np.maximum(box[2:], np.maximum(box[:2], 0) + 2)
    return [name, label, float(score), *np.round([*low, *high], 1).tolist()]


def main():
    golden = make_set(np.random.default_rng(20))
    with tempfile.TemporaryDirectory() as folder:
        golden["expected"] = measure(golden, Path(folder))
    GOLDEN_PATH.write_text(json.dumps(golden, indent=None) + "\n", encoding="utf-8")
    print(json.dumps(golden["expected"], indent=1))


if __name__ == "__main__":
    main()
