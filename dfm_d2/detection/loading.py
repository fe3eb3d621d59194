"""A trained detector from its weight file alone: where it is used, the data set need not be."""

from torch import nn

from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.checkpoint import class_names_of
from dfm_d2.engine.run import load_for_inference
from dfm_d2.engine.setup import check_weights, resolve_device, validate_config
from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode


def load_detector(cfg: CfgNode, explicit_device: bool = False) -> tuple[nn.Module, list[str]]:
    """The model of ``MODEL.WEIGHTS`` in evaluation mode and its class names; ``cfg`` is completed in place.

    The names are those that the checkpoint was trained for, else ``DATASETS.CLASSES``, else numbers.
    explicit_device: see ``resolve_device``.
    Raises UserError for bad values, a missing file and the weights of another model.
    """
    validate_config(DETECTION, cfg)
    resolve_device(cfg, explicit_device)
    weights, dfm = cfg.MODEL.WEIGHTS, cfg.MODEL.DFM
    check_weights(weights)
    trained = class_names_of(weights)
    classes = trained or list(cfg.DATASETS.CLASSES) or [*map(str, range(dfm.NUM_CLASSES))]
    if not classes:
        raise UserError(f"{weights} does not say its classes: set DATASETS.CLASSES or MODEL.DFM.NUM_CLASSES.")
    if dfm.NUM_CLASSES not in (0, len(classes)):
        source = f"{weights} was trained for" if trained else "DATASETS.CLASSES names"
        raise UserError(
            f"MODEL.DFM.NUM_CLASSES is {dfm.NUM_CLASSES}, but {source} {len(classes)} classes: set it to 0."
        )
    dfm.NUM_CLASSES = len(classes)
    return load_for_inference(DETECTION, cfg, classes), classes
