"""ClassificationEvaluator: accuracy and calibration of class probabilities, and the file to check them by.

Shapes: n images, K classes.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dfm_d2.data.files import write_text_atomically
from dfm_d2.engine.metrics import calibration_error
from dfm_d2.errors import UserError
from dfm_d2.framework import DatasetEvaluator, MetadataCatalog, comm


class ClassificationEvaluator(DatasetEvaluator):
    """Collects probabilities; an evaluator for Detectron2's inference_on_dataset."""

    def __init__(self, dataset_name: str, output_dir: Path) -> None:
        """output_dir: folder for predictions.json, a line {image_id, label, probs} an image."""
        self._classes = list(MetadataCatalog.get(dataset_name).thing_classes)
        self._output_dir = output_dir
        self._found: list[dict] = []

    def reset(self) -> None:
        self._found = []

    def process(self, inputs: Iterable[dict], outputs: Iterable[dict]) -> None:
        """Take the model's outputs, {"probs": (K,)} an image. UserError for those that are not finite."""
        for source, output in zip(inputs, outputs):
            probs = output["probs"].detach().double().cpu().numpy()
            if not np.isfinite(probs).all():
                raise UserError(f"{source['file_name']} has class probabilities that are not finite.")
            known = {key: source[key] for key in ("image_id", "label")}
            self._found.append(known | {"probs": probs.tolist()})

    def evaluate(self) -> OrderedDict:
        """accuracy, nll, ece and accuracy-<class>, in percent and nats; {} on processes but the main.

        Raises UserError where not one image could be read.
        """
        comm.synchronize()
        gathered = comm.gather(self._found, dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        found = [item for share in gathered for item in share]
        if not found:
            raise UserError("Not one image of the test set could be read: check the files of DATASETS.TEST.")
        lines = "".join(json.dumps(item) + "\n" for item in found)
        write_text_atomically(self._output_dir / "predictions.json", lines)
        probs = np.array([item["probs"] for item in found])
        return classification_metrics(probs, np.array([item["label"] for item in found]), self._classes)


def classification_metrics(probs: np.ndarray, labels: np.ndarray, classes: list[str]) -> OrderedDict:
    """Metrics of probabilities `(n, K)` and labels `(n,)`; ece is that of `calibration_error`."""
    right = probs.argmax(1) == labels
    likelihood = np.clip(probs[np.arange(len(labels)), labels], 1e-12, None)
    results = OrderedDict(
        accuracy=100 * float(right.mean()),
        nll=float(-np.log(likelihood).mean()),
        ece=calibration_error(probs.max(1), right),
    )
    for index, name in enumerate(classes):
        of_class = right[labels == index]
        results[f"accuracy-{name}"] = 100 * float(of_class.mean()) if len(of_class) else float("nan")
    return results


def class_summary(results: dict[str, float]) -> str:
    """One line of the first metrics."""
    return f"accuracy {results['accuracy']:.2f}%, nll {results['nll']:.4f}, ece {results['ece']:.2f}%"
