"""When two detections are the same, and the formats that answer the same."""

import pytest
import torch

from dfm_d2.export import FORMATS

CLASSES = ("RBC", "WBC", "Platelets")

# AOTInductor's compilation takes minutes.
EVERY_FORMAT = [pytest.param(name, marks=[pytest.mark.slow] * (name == "aoti")) for name in FORMATS]
BATCHED = [param for param in EVERY_FORMAT if param.values[0] != "torchscript"]


def assert_equal_detections(found, expected):
    """Boxes to 0.1 pixel, the same classes, scores to 1e-4."""
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=0.1)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
    assert torch.equal(found.pred_classes, expected.pred_classes)
