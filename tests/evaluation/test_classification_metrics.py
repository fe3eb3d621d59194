"""Accuracy, likelihood and calibration error, by hand."""

import math

import numpy as np
import pytest

from dfm_d2.classification.evaluation import class_summary, classification_metrics


def test_metrics_by_hand():
    probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.05, 0.95]])
    found = classification_metrics(probs, np.array([0, 1, 1, 1]), ["a", "b"])
    assert found["accuracy"] == 75 and found["accuracy-a"] == 100
    assert found["accuracy-b"] == pytest.approx(200 / 3)
    assert found["nll"] == pytest.approx(-sum(map(math.log, (0.9, 0.4, 0.7, 0.95))) / 4)
    # Bins of 1/15: each confidence lies in one of its own, but 0.95 and 0.9 (13.5 and 14.25) do too.
    assert found["ece"] == pytest.approx(100 * (0.1 + 0.6 + 0.3 + 0.05) / 4)
    assert class_summary(found).startswith("accuracy 75.00%")


def test_confident_and_right_is_calibrated_and_a_class_without_images_is_nan():
    found = classification_metrics(np.eye(2)[[0, 0]], np.array([0, 0]), ["a", "b"])
    assert found["ece"] == 0 and found["nll"] == pytest.approx(0) and math.isnan(found["accuracy-b"])
