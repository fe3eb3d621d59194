"""The pictures: they are written, have content, and survive images without objects or detections."""

import numpy as np
import pytest
from PIL import Image

from dfm_d2.visualize import draw_flow, draw_predictions

CLASSES = ["circle", "square", "star"]


def _pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("score_thresh", [0.0, 2.0])
def test_both_pictures(tmp_path, make_model, make_input, score_thresh):
    model = make_model().eval()
    item = make_input()
    image = np.full((96, 128, 3), 255, dtype=np.uint8)
    found = [model.inference([item])[0]["instances"]] * 2
    truths = [[((10, 10, 60, 50), 1)], []]
    predictions = draw_predictions(
        tmp_path / "new" / "predictions.png", [image] * 2, truths, found, CLASSES, score_thresh
    )
    flow = draw_flow(tmp_path / "flow.png", model, item, image, CLASSES, score_thresh)
    for path in (predictions, flow):
        assert min(_pixels(path).shape[:2]) > 200
    assert (_pixels(predictions).std(axis=2) > 10).any(), "no coloured box was drawn"
    assert (_pixels(flow) < 200).sum() > 1000
