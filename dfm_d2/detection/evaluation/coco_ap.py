"""COCO average precision by pycocotools, from dicts in memory."""

import contextlib
import io

_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCOeval.stats


def coco_ground_truth(dicts: list[dict], categories: list[dict]) -> dict:
    """COCO json of a registered data set.

    Args:
        dicts: Detectron2 data set dicts, boxes XYXY_ABS.
        categories: [{"id", "name"}] in the order of the contiguous class indices.

    Difficult objects become `iscrowd`, the one flag by which COCO tools ignore an object: a detection that
    lies in it counts neither for nor against. (pycocotools overwrites `ignore`; so outside tools that read
    this json find our numbers.)
    """
    images, annotations = [], []
    for entry in dicts:
        image = {key: entry[key] for key in ("file_name", "height", "width")}
        images.append({**image, "id": entry["image_id"]})
        for target in entry["annotations"]:
            x0, y0, x1, y1 = target["bbox"]
            annotations.append(
                {
                    "id": len(annotations) + 1,  # from 1: COCOeval takes id 0 for "no match"
                    "image_id": entry["image_id"],
                    "category_id": categories[target["category_id"]]["id"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": target.get("area", (x1 - x0) * (y1 - y0)),
                    "iscrowd": int(bool(target.get("iscrowd", 0)) or bool(target.get("difficult", 0))),
                }
            )
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def coco_average_precisions(ground_truth: dict, detections: list[dict]) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl and AP-<class>, AP50-<class>, in percent.

    Args:
        ground_truth: COCO json, from `coco_ground_truth`.
        detections: COCO results, [{"image_id", "category_id", "bbox" XYWH, "score"}].

    NaN where there is no ground truth; 0 everywhere else if there are no detections.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def indexed(annotations: list[dict]) -> COCO:
        coco = COCO()
        coco.dataset = {**ground_truth, "annotations": annotations}
        coco.createIndex()
        return coco

    # As COCO.loadRes, which fails on an empty list and writes into the entries that it gets.
    found = [
        {**item, "id": number, "area": item["bbox"][2] * item["bbox"][3], "iscrowd": 0}
        for number, item in enumerate(detections, start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluation = COCOeval(indexed(ground_truth["annotations"]), indexed(found), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    results = {key: _percent(value) for key, value in zip(_STATS, evaluation.stats)}
    # precision: (IoU thresholds, recalls, classes, areas, detection limits); area 0 is "all", limit -1 is 100
    precision = evaluation.eval["precision"]
    for category in ground_truth["categories"]:
        # COCOeval keeps classes in the order of their ids, which need not be ours.
        of_class = precision[:, :, evaluation.params.catIds.index(category["id"]), 0, -1]
        for key, part in (("AP", of_class), ("AP50", of_class[:1])):
            measured = part[part > -1]
            results[f"{key}-{category['name']}"] = _percent(measured.mean() if measured.size else -1.0)
    return results


def _percent(value: float) -> float:
    """COCOeval says -1 where there is nothing to measure."""
    return float(value) * 100 if value > -1 else float("nan")
