"""The temperature of a detector's scores, and the threshold from which they are shown."""

import logging
import math
from pathlib import Path

import numpy as np

from dfm_d2.data.catalog import HELD_OUT, register
from dfm_d2.detection.data.loader import build_test_loader
from dfm_d2.detection.evaluation.evaluator import DetectionEvaluator, Matches
from dfm_d2.detection.inference import BoxFlowModel
from dfm_d2.engine.precision import inference_autocast
from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode, DatasetCatalog, MetadataCatalog, comm, inference_on_dataset

_MOST_IMAGES = 100  # so that it takes seconds
_SET = "calibration"  # the data set of these images

_logger = logging.getLogger(__name__)


def calibrate(cfg: CfgNode, model: BoxFlowModel) -> None:
    """Set the temperature and the threshold of a trained model; all processes together.

    On images that DATASETS.HOLD_OUT set aside. Where it is 0, the threshold is that of training images, and
    the temperature stays 1: scores on images that were trained on are too good.
    """
    held_out = cfg.DATASETS.HOLD_OUT > 0
    names = [HELD_OUT] if held_out else cfg.DATASETS.TRAIN
    entries = [entry for name in names for entry in DatasetCatalog.get(name)]
    chosen = entries[:: math.ceil(len(entries) / _MOST_IMAGES)]
    # Numbered anew: images of several sets may have one id.
    chosen = [entry | {"image_id": number} for number, entry in enumerate(chosen)]
    register(_SET, chosen, MetadataCatalog.get(names[0]).thing_classes)
    evaluator = DetectionEvaluator(_SET, Path(cfg.OUTPUT_DIR) / "inference" / _SET)
    model.temperature.fill_(1.0)
    with inference_autocast(cfg):
        inference_on_dataset(model, build_test_loader(cfg, _SET), evaluator)
    values, found = None, evaluator.matches
    if found is not None:
        values = fitted_temperature(found) if held_out else 1.0, best_threshold(found)
    temperature, threshold = comm.all_gather(values)[0]
    model.temperature.fill_(temperature)
    model.threshold.copy_(model.calibrated(model.temperature.new_tensor(threshold)))
    said = "temperature %.3f and score threshold %.3f, found on %d %s images"
    _logger.info(said, temperature, model.threshold, len(chosen), "held-out" if held_out else "training")


def fitted_temperature(found: Matches) -> float:
    """T of greatest likelihood: a detection of score s is right with probability sigmoid(logit(s) / T)."""
    from scipy.optimize import minimize_scalar

    scores = np.clip(found.scores, 1e-7, 1 - 1e-7)
    logits = np.where(found.right, 1, -1) * np.log(scores / (1 - scores))

    def loss(log_temperature: float) -> float:
        return np.logaddexp(0, -logits / math.exp(log_temperature)).mean()

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.1), math.log(10)), method="bounded").x)


def best_threshold(found: Matches) -> float:
    """The score from which on detections have the greatest F1, in the middle between two of them."""
    order = np.argsort(-found.scores, kind="stable")
    scores = np.append(found.scores[order], 0.0)
    f1 = 2 * np.cumsum(found.right[order]) / (np.arange(1, len(scores)) + found.objects)
    best = int(f1.argmax()) if len(f1) else 0
    return float(scores[best : best + 2].mean())


def chosen_threshold(model: BoxFlowModel, threshold: float | str) -> float:
    """The number that is given, or of "auto" the model's own. Raises UserError where it has none."""
    if threshold != "auto":
        return float(threshold)
    if model.threshold == 0:
        raise UserError(
            "The checkpoint has no score threshold, which a training finds at its end: give a number, or "
            "train one iteration more (tools/train_net.py --resume, with SOLVER.MAX_ITER greater by 1)."
        )
    return float(model.threshold)
