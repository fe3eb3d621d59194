"""The tiny fixed set of golden_ap.json as data set dicts, as model outputs and as a VOC folder."""

import json
from pathlib import Path

import torch

from dfm_d2.data.catalog import register
from dfm_d2.detection.evaluation.evaluator import DetectionEvaluator
from dfm_d2.framework import Boxes, BoxMode, Instances

GOLDEN_PATH = Path(__file__).with_name("golden_ap.json")


def load_golden():
    return json.loads(GOLDEN_PATH.read_text(encoding="utf-8"))


def dataset_dicts(golden, difficult_key="difficult"):
    """Data set dicts; Detectron2's COCOEvaluator knows only iscrowd, so it gets difficult as that."""
    return [
        {
            "file_name": f"{image['image_id']}.jpg",
            **{key: image[key] for key in ("image_id", "width", "height")},
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}
                | {"difficult": 0, "iscrowd": 0, difficult_key: difficult}
                for label, *box, difficult in image["objects"]
            ],
        }
        for image in golden["images"]
    ]


def instances_of(rows, size=(100, 100)):
    """rows: (class, score, x0, y0, x1, y1)"""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    instances = Instances(size)
    instances.pred_classes, instances.scores = table[:, 0].long(), table[:, 1]
    instances.pred_boxes = Boxes(table[:, 2:])
    return instances


def outputs_of(golden):
    """[(input dict, output dict)] of a model that makes exactly the golden detections."""
    pairs = []
    for image in golden["images"]:
        rows = [row[1:] for row in golden["detections"] if row[0] == image["image_id"]]
        instances = instances_of(rows, (image["height"], image["width"]))
        pairs.append(({"image_id": image["image_id"]}, {"instances": instances}))
    return pairs


def evaluator_of(golden, output_dir, metadata=None):
    register("golden_ours", dataset_dicts(golden), golden["classes"], **(metadata or {}))
    return DetectionEvaluator("golden_ours", output_dir)


def evaluate(evaluator, pairs):
    """The metrics of an evaluator, ours or Detectron2's."""
    evaluator.reset()
    for source, output in pairs:
        evaluator.process([source], [output])
    return evaluator.evaluate()["bbox"]


def write_voc_folder(golden, root):
    """Annotations and the split "golden" in VOC layout, without images."""
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for image in golden["images"]:
        objects = "".join(
            f"<object><name>{golden['classes'][label]}</name><pose>Unspecified</pose>"
            f"<truncated>0</truncated><difficult>{difficult}</difficult><bndbox><xmin>{x0 + 1}</xmin>"
            f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, x0, y0, x1, y1, difficult in image["objects"]
        )
        path = root / "Annotations" / f"{image['image_id']}.xml"
        path.write_text(f"<annotation>{objects}</annotation>")
    names = "\n".join(image["image_id"] for image in golden["images"])
    (root / "ImageSets" / "Main" / "golden.txt").write_text(names)
