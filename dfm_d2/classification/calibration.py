"""The temperature of a classifier's probabilities, fitted on images that it was not trained on."""

import logging
from collections.abc import Iterable

import torch

from dfm_d2.classification.base import Classifier
from dfm_d2.engine.precision import inference_autocast
from dfm_d2.framework import CfgNode, comm

_logger = logging.getLogger(__name__)


def calibrate(cfg: CfgNode, model: Classifier, loader: Iterable[list[dict]]) -> None:
    """Fit the temperature of `model` on the batches of `loader`, those of all processes together."""
    was_training = model.training
    model.eval()
    logits, labels = [], []
    with inference_autocast(cfg):
        for batch in loader:
            logits.append(model.logits_of(batch).cpu())
            labels += [item["label"] for item in batch]
    model.train(was_training)
    shares = comm.all_gather((torch.cat(logits) if logits else None, labels))
    found = torch.cat([share for share, _ in shares if share is not None])
    known = torch.tensor([label for _, share in shares for label in share])
    temperature = model.fit_temperature(found, known)
    _logger.info("temperature %.4f, fitted on %d held-out images", temperature, len(known))
