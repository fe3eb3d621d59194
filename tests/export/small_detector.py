"""A detector whose graph is small, when two detections are the same, and the formats that answer the same."""

import pytest
import torch
from tiny_model import spread, tiny_cfg

from dfm_d2.export import FORMATS
from dfm_d2.framework import build_model

CLASSES = ("RBC", "WBC", "Platelets")
# AOTInductor's compilation takes minutes.
EVERY_FORMAT = [pytest.param(name, marks=[pytest.mark.slow] * (name == "aoti")) for name in FORMATS]


def small_cfg(architecture="FlowDetector", **dfm):
    """Two stages of a ResNet-18: a seventh of the convolutions of tiny_cfg."""
    cfg = tiny_cfg(NUM_PREDICTORS=2, NUM_PROPOSALS=24, HEAD__IN_FEATURES=["p2", "p3"], **dfm)
    cfg.MODEL.META_ARCHITECTURE = architecture
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS = 18, 64, 64
    resnets.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3"]
    return cfg


def small_detector(cfg):
    torch.manual_seed(0)
    return spread(build_model(cfg)).eval()


def assert_equal_detections(found, expected):
    """Boxes to 0.1 pixel, the same classes, scores to 1e-4."""
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=0.1)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
    assert torch.equal(found.pred_classes, expected.pred_classes)
