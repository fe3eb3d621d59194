"""A trained detector from its weight file alone: where it is used, the data set need not be."""

from collections.abc import Sequence

from torch import nn

from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.checkpoint import class_names_of
from dfm_d2.engine.run import load_for_inference
from dfm_d2.engine.setup import resolve_device, validate_config
from dfm_d2.errors import UserError, input_errors
from dfm_d2.framework import CfgNode


def load_detector(cfg: CfgNode, explicit_device: bool = False) -> tuple[nn.Module, list[str]]:
    """The model of ``MODEL.WEIGHTS`` in evaluation mode and its class names; ``cfg`` is completed in place.

    The names are those that the checkpoint was trained for, else ``DATASETS.CLASSES``, else numbers.

    explicit_device: see ``resolve_device``. Raises UserError, one sentence, for bad values, a missing file
    and the weights of another model.
    """
    with input_errors():
        validate_config(DETECTION, cfg)
        resolve_device(cfg, explicit_device)
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty: set it to a checkpoint.")
        classes = class_names_of(cfg.MODEL.WEIGHTS) or _config_classes(cfg)
        if cfg.MODEL.DFM.NUM_CLASSES not in (0, len(classes)):
            raise UserError(
                f"MODEL.DFM.NUM_CLASSES is {cfg.MODEL.DFM.NUM_CLASSES}, but {cfg.MODEL.WEIGHTS} was trained "
                f"for {len(classes)} classes: set it to 0."
            )
        cfg.MODEL.DFM.NUM_CLASSES = len(classes)
    return load_for_inference(DETECTION, cfg, classes), classes


def _config_classes(cfg: CfgNode) -> Sequence[str]:
    """Of a weight file that names none."""
    if cfg.DATASETS.CLASSES:
        return list(cfg.DATASETS.CLASSES)
    if cfg.MODEL.DFM.NUM_CLASSES < 1:
        raise UserError(
            f"{cfg.MODEL.WEIGHTS} does not say its classes: set DATASETS.CLASSES, or MODEL.DFM.NUM_CLASSES."
        )
    return [str(index) for index in range(cfg.MODEL.DFM.NUM_CLASSES)]
