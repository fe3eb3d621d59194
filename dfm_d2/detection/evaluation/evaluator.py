"""DetectionEvaluator: AP and calibration on any registered data set, and the files to check them by."""

import contextlib
import io
import json
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from dfm_d2.data.files import write_text_atomically
from dfm_d2.detection.evaluation.voc_ap import average_precisions, match_detections
from dfm_d2.engine.metrics import calibration_error
from dfm_d2.errors import UserError
from dfm_d2.framework import DatasetCatalog, DatasetEvaluator, MetadataCatalog, comm

logger = logging.getLogger(__name__)

_COCO_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCOeval.stats
_VOC_KEYS = ("VOC07_AP50", "VOC_AP50")  # what average_precisions returns


class Matches(NamedTuple):
    """Detections by pycocotools at IoU 0.5, without those that lie in ignored objects.

    scores: `(M,)`. right: bool `(M,)`, whether it has an object of its class to itself. objects: how many.
    """

    scores: np.ndarray
    right: np.ndarray
    objects: int


class DetectionEvaluator(DatasetEvaluator):
    """Collects detections and computes their AP; an evaluator for Detectron2's inference_on_dataset.

    matches: of the last evaluation, on the main process.
    """

    matches: Matches | None = None

    def __init__(self, dataset_name: str, output_dir: Path) -> None:
        """
        dataset_name: a registered data set. output_dir: folder for coco_instances_results.json (detections)
        and instances_gt.json (ground truth), both in COCO's format.
        """
        self._name = dataset_name
        self._output_dir = output_dir
        self._dicts = DatasetCatalog.get(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        # COCO categories in the order of the class indices, with the data set's own ids where it has them.
        ids = getattr(metadata, "thing_dataset_id_to_contiguous_id", None) or {}
        own, free = {index: key for key, index in ids.items()}, max(ids, default=-1) + 1
        classes = enumerate(metadata.thing_classes)
        self._categories = [{"id": own.get(k, free + k), "name": name} for k, name in classes]
        self._image_ids = {entry["image_id"] for entry in self._dicts}
        self._detections: list[dict] = []

    def reset(self) -> None:
        self._detections = []

    def process(self, inputs: Iterable[dict], outputs: Iterable[dict]) -> None:
        """Take the model's outputs: {"instances": Instances with pred_boxes, scores, pred_classes} an image.

        Raises ValueError for an image that is not in the data set, UserError for a class that it lacks.
        """
        for source, output in zip(inputs, outputs):
            if source["image_id"] not in self._image_ids:
                raise ValueError(f"Image {source['image_id']!r} is not in the data set {self._name}.")
            self._detections += self._to_coco(source["image_id"], output["instances"])

    def _to_coco(self, image_id: str | int, instances) -> list[dict]:
        boxes = instances.pred_boxes.tensor.detach().cpu().double().numpy().reshape(-1, 4)
        scores = instances.scores.detach().cpu().double().numpy()
        classes = instances.pred_classes.detach().cpu().numpy()
        if len(classes) and not 0 <= classes.min() <= classes.max() < len(self._categories):
            raise UserError(
                f"A detection in image {image_id!r} has class {classes.max()}, but {self._name} has "
                f"{len(self._categories)} classes: MODEL.DFM.NUM_CLASSES and the data set disagree."
            )
        finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
        if lost := (~finite).sum():
            logger.warning("image %r: %d detections that are not finite are left out", image_id, lost)
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(boxes[finite].tolist(), scores[finite].tolist(), classes[finite].tolist())
        return [
            {"image_id": image_id, "category_id": self._categories[k]["id"], "bbox": box, "score": score}
            for box, score, k in rows
        ]

    def evaluate(self) -> OrderedDict:
        """{"bbox": {metric: percent}} on the main process, an empty dict on the others.

        Metrics: AP, AP50, AP75, APs, APm, APl, AP-<class>, AP50-<class> of pycocotools; VOC07_AP50 (11
        points), VOC_AP50 (area), and both of each class; D-ECE (Kueppers et al. 2020, arXiv 2004.13546), the
        calibration error of all detections. NaN for what has no ground truth.
        """
        comm.synchronize()
        gathered = comm.gather(self._detections, dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        detections = [item for share in gathered for item in share]
        ground_truth = coco_ground_truth(self._dicts, self._categories)
        write_text_atomically(self._output_dir / "coco_instances_results.json", json.dumps(detections))
        write_text_atomically(self._output_dir / "instances_gt.json", json.dumps(ground_truth))
        if not detections:
            logger.warning("data set %s: the model made no detection at all", self._name)
        results, found = coco_average_precisions(ground_truth, detections)
        self.matches = found
        results["D-ECE"] = calibration_error(found.scores, found.right) if found.objects else float("nan")
        precisions = _voc_precisions(self._dicts, self._categories, detections)
        for index, key in enumerate(_VOC_KEYS):
            column = {name: 100 * values[index] for name, values in precisions.items()}
            known = [value for value in column.values() if not np.isnan(value)]
            results[key] = float(np.mean(known)) if known else float("nan")
            results.update({f"{key}-{name}": value for name, value in column.items()})
        return OrderedDict(bbox=results)


def coco_ground_truth(dicts: list[dict], categories: list[dict]) -> dict:
    """COCO json of the dicts of a data set and its categories, [{"id", "name"}] by class index.

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
            annotation = {
                "id": len(annotations) + 1,  # from 1: COCOeval takes id 0 for "no match"
                "image_id": entry["image_id"],
                "category_id": categories[target["category_id"]]["id"],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": target.get("area", (x1 - x0) * (y1 - y0)),
                "iscrowd": int(_is_ignored(target)),
            }
            annotations.append(annotation)
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def coco_average_precisions(ground_truth: dict, detections: list[dict]) -> tuple[dict[str, float], Matches]:
    """AP, AP50, AP75, APs, APm, APl and AP-<class>, AP50-<class>, in percent, by pycocotools; its matches.

    ground_truth: COCO json. detections: COCO results, [{"image_id", "category_id", "bbox" XYWH, "score"}].
    NaN where there is no ground truth; 0 everywhere else if there are no detections.
    """

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
    results = {key: _percent(value) for key, value in zip(_COCO_KEYS, evaluation.stats)}
    # precision: (IoU thresholds, recalls, classes, areas, detection limits); area 0 is "all", limit -1 is 100
    precision = evaluation.eval["precision"]
    for category in ground_truth["categories"]:
        # COCOeval keeps classes in the order of their ids, which need not be ours.
        of_class = precision[:, :, evaluation.params.catIds.index(category["id"]), 0, -1]
        for key, part in (("AP", of_class), ("AP50", of_class[:1])):
            measured = part[part > -1]
            results[f"{key}-{category['name']}"] = _percent(measured.mean() if measured.size else -1.0)
    return results, _matches(evaluation)


def _matches(evaluation: COCOeval) -> Matches:
    area = evaluation.params.areaRng[0]  # all
    found = [item for item in evaluation.evalImgs if item is not None and item["aRng"] == area]
    # By class and image; the first of the IoU thresholds is 0.5.
    scores = np.array([score for item in found for score in item["dtScores"]], float)
    right = np.array([match > 0 for item in found for match in item["dtMatches"][0]], bool)
    counted = np.array([not ignored for item in found for ignored in item["dtIgnore"][0]], bool)
    objects = sum(not ignored for item in found for ignored in item["gtIgnore"])
    return Matches(scores[counted], right[counted], objects)


def _is_ignored(target: dict) -> bool:
    return bool(target.get("difficult", 0) or target.get("iscrowd", 0))


def _percent(value: float) -> float:
    """COCOeval says -1 where there is nothing to measure."""
    return float(value) * 100 if value > -1 else float("nan")


def _voc_precisions(
    dicts: list[dict], categories: list[dict], detections: list[dict]
) -> dict[str, tuple[float, float]]:
    """{class: (11-point AP, area AP)} in [0, 1]; difficult and crowd objects are ignored."""
    results, of_category = {}, defaultdict(list)
    for item in detections:
        of_category[item["category_id"]].append(item)
    for label, category in enumerate(categories):
        truths = {}
        for entry in dicts:
            targets = [target for target in entry["annotations"] if target["category_id"] == label]
            if targets:
                boxes = np.array([target["bbox"] for target in targets], dtype=np.float64)
                truths[entry["image_id"]] = boxes, np.array(list(map(_is_ignored, targets)))
        found = of_category[category["id"]]
        boxes = np.array([item["bbox"] for item in found], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        image_ids, scores = [item["image_id"] for item in found], np.array([item["score"] for item in found])
        matches = match_detections(truths, image_ids, scores, boxes)
        positives = sum(int((~ignored).sum()) for _, ignored in truths.values())
        results[category["name"]] = average_precisions(*matches, positives)
    return results


def format_table(results: dict[str, dict[str, float]]) -> str:
    """A text table of {"bbox": metrics}: a row per class, then their mean; "-" where nothing is measured."""
    metrics = results["bbox"]
    columns = ["AP", "AP50", *_VOC_KEYS, "D-ECE"]
    names = [key.removeprefix("AP-") for key in metrics if key.startswith("AP-")]
    rows = [[name, *(metrics.get(f"{column}-{name}", np.nan) for column in columns)] for name in names]
    rows.append(["mean", *(metrics[column] for column in columns)])
    shown = [[row[0], *("-" if np.isnan(value) else f"{value:.1f}" for value in row[1:])] for row in rows]
    align = ["left"] + ["right"] * len(columns)
    return tabulate(shown, headers=["class", *columns], colalign=align, disable_numparse=True)
