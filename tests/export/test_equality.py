"""The same detections from the detector and from its files, on photographs."""

import pytest
import torch
from detections import assert_equal_detections

from dfm_d2.export import FORMATS


@pytest.mark.parametrize("format", FORMATS)
def test_three_sizes(detector, runs, photographs, format):
    run = runs[format]
    assert len({item["image"].shape for item in photographs}) == 3
    for item in photographs:
        expected = detector([item])[0]["instances"]
        found = run([item])[0]["instances"]
        assert found.image_size == expected.image_size == (item["height"], item["width"])
        assert_equal_detections(found, expected)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_batch_of_different_sizes(detector, runs, photographs, format):
    expected = detector(photographs)
    found = runs[format](photographs)
    for mine, theirs in zip(found, expected, strict=True):
        assert_equal_detections(mine["instances"], theirs["instances"])


@pytest.mark.parametrize("format", FORMATS)
def test_noise_is_an_input(detector, runs, photographs, format):
    item, run = photographs[0], runs[format]
    x_0 = torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(3))
    expected = detector.inference([item], x_0)[0]["instances"]
    assert_equal_detections(run([item], x_0)[0]["instances"], expected)
    other = run([item])[0]["instances"]
    assert len(other) != len(expected) or not torch.equal(other.scores, expected.scores)


@pytest.mark.parametrize("format", FORMATS)
def test_a_photograph_without_detections(detector, runs, photographs, format):
    """Padding alone comes out where no score passes."""
    item = photographs[0]
    thresh = detector.sampler.settings.score_thresh
    run = runs[format]
    far = torch.full((1, 24, 4), -50.0)  # boxes without extent in a corner
    expected = detector.inference([item], far)[0]["instances"]
    found = run([item], far)[0]["instances"]
    assert len(found) == len(expected)
    assert (found.scores > thresh).all()
