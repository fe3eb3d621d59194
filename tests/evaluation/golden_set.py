"""The tiny fixed set of golden_ap.json as data set dicts, as model outputs and as a VOC folder.

8 images of random objects, whose detections are jittered objects, duplicates and noise, with boxes of one
decimal and scores of three, all different, as Detectron2's VOC evaluator writes them. What the evaluators of
the real Detectron2 say of it is written into golden_ap.json by `python tests/evaluation/golden_set.py`.
"""

import json
import tempfile
from operator import itemgetter
from pathlib import Path

import torch

from dfm_d2.data.catalog import register
from dfm_d2.detection.evaluation.evaluator import DetectionEvaluator
from dfm_d2.framework import Boxes, BoxMode, Instances

GOLDEN_PATH = Path(__file__).with_name("golden_ap.json")


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
    fields = {"pred_classes": table[:, 0].long(), "scores": table[:, 1], "pred_boxes": Boxes(table[:, 2:])}
    return Instances(size, **fields)


def outputs_of(golden):
    """[(input dict, output dict)] of a model that makes exactly the golden detections."""
    pairs = []
    for image_id, *size in map(itemgetter("image_id", "height", "width"), golden["images"]):
        rows = [row[1:] for row in golden["detections"] if row[0] == image_id]
        pairs.append(({"image_id": image_id}, {"instances": instances_of(rows, tuple(size))}))
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


def measure_with_detectron2(golden, folder):
    """{"coco": {AP, AP50, ..., AP-<class>}, "voc07": AP50, "voc": AP50}, in percent."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

    root = folder / "voc"  # annotations and the split "golden" in VOC layout, without images
    for part in ("Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    for image in golden["images"]:
        objects = "".join(
            f"<object><name>{golden['classes'][label]}</name><pose>Unspecified</pose>"
            f"<truncated>0</truncated><difficult>{difficult}</difficult><bndbox><xmin>{x0 + 1}</xmin>"
            f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, x0, y0, x1, y1, difficult in image["objects"]
        )
        (root / "Annotations" / f"{image['image_id']}.xml").write_text(f"<annotation>{objects}</annotation>")
    names = "\n".join(image["image_id"] for image in golden["images"])
    (root / "ImageSets" / "Main" / "golden.txt").write_text(names)
    dicts = dataset_dicts(golden, difficult_key="iscrowd")
    for name, year in (("coco", 0), ("voc07", 2007), ("voc", 2012)):
        DatasetCatalog.register(f"golden_d2_{name}", lambda: dicts)
        metadata = {"dirname": str(root), "split": "golden", "year": year} if year else {}
        MetadataCatalog.get(f"golden_d2_{name}").set(thing_classes=list(golden["classes"]), **metadata)
    options = {"tasks": ("bbox",), "distributed": False, "use_fast_impl": False}
    coco = COCOEvaluator("golden_d2_coco", output_dir=str(folder / "coco"), **options)
    result = {"coco": dict(evaluate(coco, outputs_of(golden)))}
    for kind in ("voc07", "voc"):
        voc = evaluate(PascalVOCDetectionEvaluator(f"golden_d2_{kind}"), outputs_of(golden))
        result[kind] = float(voc["AP50"])
    return result


if __name__ == "__main__":
    golden = json.loads(GOLDEN_PATH.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        golden["expected"] = measure_with_detectron2(golden, Path(scratch))
    GOLDEN_PATH.write_text(json.dumps(golden) + "\n", encoding="utf-8")
    print(json.dumps(golden["expected"], indent=1))
