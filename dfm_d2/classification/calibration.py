"""The temperature of a classifier's probabilities, fitted on images that it was not trained on."""

import logging

import torch

from dfm_d2.classification.base import Classifier
from dfm_d2.classification.data.loader import build_class_test_loader
from dfm_d2.classification.data.registration import HELD_OUT
from dfm_d2.engine.precision import inference_autocast
from dfm_d2.framework import CfgNode, comm

_logger = logging.getLogger(__name__)


def calibrate(cfg: CfgNode, model: Classifier) -> None:
    """Fit the temperature of `model` on what DATASETS.HOLD_OUT set aside; all processes together."""
    if cfg.DATASETS.HOLD_OUT == 0:
        return
    was_training = model.training
    model.eval()
    logits, labels = [], []
    with inference_autocast(cfg):
        for batch in build_class_test_loader(cfg, HELD_OUT):
            logits.append(model.logits_of(batch).cpu())
            labels += [item["label"] for item in batch]
    model.train(was_training)
    shares = comm.all_gather((torch.cat(logits) if logits else None, labels))
    found = torch.cat([share for share, _ in shares if share is not None])
    known = torch.tensor([label for _, share in shares for label in share])
    temperature = model.fit_temperature(found, known)
    _logger.info("temperature %.4f, fitted on %d held-out images", temperature, len(known))
