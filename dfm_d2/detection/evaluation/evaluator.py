"""DetectionEvaluator: COCO AP and VOC AP of any registered data set, and the files to check them by."""

import json
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from dfm_d2.data.files import write_text_atomically
from dfm_d2.detection.evaluation.coco_ap import coco_average_precisions, coco_ground_truth
from dfm_d2.detection.evaluation.voc_ap import average_precisions, match_detections
from dfm_d2.errors import UserError
from dfm_d2.framework import DatasetCatalog, DatasetEvaluator, MetadataCatalog, comm

logger = logging.getLogger(__name__)

# The key of each VOC AP in the results, and its index in what average_precisions returns.
_VOC_KEYS = {"voc07": ("VOC07_AP50", 0), "voc": ("VOC_AP50", 1)}


class DetectionEvaluator(DatasetEvaluator):
    """Collects detections and computes their AP; an evaluator for Detectron2's inference_on_dataset."""

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path | None = None,
        ap_kinds: Sequence[str] = ("coco", "voc07", "voc"),
    ) -> None:
        """
        Args:
            dataset_name: a registered data set.
            output_dir: folder for coco_instances_results.json (detections) and instances_gt.json
                (ground truth), both in COCO's format; None writes nothing.
            ap_kinds: what to compute, of "coco", "voc07" (11 points), "voc" (area).
        """
        self._name, self._kinds = dataset_name, tuple(ap_kinds)
        self._output_dir = None if output_dir is None else Path(output_dir)
        metadata = MetadataCatalog.get(dataset_name)
        self._dicts = DatasetCatalog.get(dataset_name)
        ids = getattr(metadata, "thing_dataset_id_to_contiguous_id", None)
        self._categories = make_categories(metadata.thing_classes, ids)
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
        if not finite.all():
            logger.warning(
                "image %r: %d detections that are not finite are left out", image_id, (~finite).sum()
            )
        boxes[:, 2:] -= boxes[:, :2]
        return [
            {
                "image_id": image_id,
                "category_id": self._categories[label]["id"],
                "bbox": box.tolist(),
                "score": float(score),
            }
            for box, score, label in zip(boxes[finite], scores[finite], classes[finite])
        ]

    def evaluate(self) -> OrderedDict:
        """{"bbox": {metric: percent}} on the main process, an empty dict on the others.

        Metrics: AP, AP50, AP75, APs, APm, APl, AP-<class>, AP50-<class> ("coco"); VOC07_AP50 and
        VOC07_AP50-<class> ("voc07"); VOC_AP50 and VOC_AP50-<class> ("voc"). NaN for what has no ground truth.
        """
        comm.synchronize()
        gathered = comm.gather(self._detections, dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        detections = [item for share in gathered for item in share]
        ground_truth = coco_ground_truth(self._dicts, self._categories)
        if self._output_dir is not None:
            write_text_atomically(self._output_dir / "coco_instances_results.json", json.dumps(detections))
            write_text_atomically(self._output_dir / "instances_gt.json", json.dumps(ground_truth))
        if not detections:
            logger.warning("data set %s: the model made no detection at all", self._name)
        results = coco_average_precisions(ground_truth, detections) if "coco" in self._kinds else {}
        voc_kinds = [kind for kind in _VOC_KEYS if kind in self._kinds]
        precisions = _voc_precisions(self._dicts, self._categories, detections) if voc_kinds else {}
        for kind in voc_kinds:
            key, index = _VOC_KEYS[kind]
            column = {name: 100 * values[index] for name, values in precisions.items()}
            known = [value for value in column.values() if not np.isnan(value)]
            results[key] = float(np.mean(known)) if known else float("nan")
            results.update({f"{key}-{name}": value for name, value in column.items()})
        return OrderedDict(bbox=results)


def make_categories(classes: Sequence[str], ids: dict[int, int] | None) -> list[dict]:
    """COCO categories in the order of the class indices, with the data set's own ids where it has them."""
    own = {index: key for key, index in (ids or {}).items()}
    free = max(own.values(), default=-1) + 1
    return [{"id": own.get(index, free + index), "name": name} for index, name in enumerate(classes)]


def _voc_precisions(
    dicts: list[dict], categories: list[dict], detections: list[dict]
) -> dict[str, tuple[float, float]]:
    """{class: (11-point AP, area AP)} in [0, 1]; difficult and crowd objects are ignored."""
    results = {}
    of_category = defaultdict(list)
    for item in detections:
        of_category[item["category_id"]].append(item)
    for label, category in enumerate(categories):
        truths = {}
        for entry in dicts:
            targets = [target for target in entry["annotations"] if target["category_id"] == label]
            if targets:
                ignored = [bool(a.get("difficult", 0) or a.get("iscrowd", 0)) for a in targets]
                boxes = np.array([target["bbox"] for target in targets], dtype=np.float64)
                truths[entry["image_id"]] = boxes, np.array(ignored)
        found = of_category[category["id"]]
        boxes = np.array([item["bbox"] for item in found], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        image_ids, scores = [item["image_id"] for item in found], np.array([item["score"] for item in found])
        matches = match_detections(truths, image_ids, scores, boxes)
        positives = sum(int((~ignored).sum()) for _, ignored in truths.values())
        results[category["name"]] = average_precisions(*matches, positives)
    return results


def format_table(results: dict[str, dict[str, float]]) -> str:
    """A text table of {"bbox": metrics}: a row per class, then their mean; "-" where is no ground truth."""
    metrics = results["bbox"]
    columns = [key for key in ("AP", "AP50", *(key for key, _ in _VOC_KEYS.values())) if key in metrics]
    prefix = f"{columns[0]}-"
    names = [key[len(prefix) :] for key in metrics if key.startswith(prefix)]
    rows = [[name, *(metrics[f"{column}-{name}"] for column in columns)] for name in names]
    rows.append(["mean", *(metrics[column] for column in columns)])
    shown = [[row[0], *("-" if np.isnan(value) else f"{value:.1f}" for value in row[1:])] for row in rows]
    alignment = ["left"] + ["right"] * len(columns)
    return tabulate(shown, headers=["class", *columns], colalign=alignment, disable_numparse=True)
