"""The temperature of a detector's scores and their threshold, from the matches of the evaluation."""

import numpy as np
import pytest
import torch
from golden_set import instances_of

from dfm_d2.data.catalog import register
from dfm_d2.detection.calibration import best_threshold, chosen_threshold, fitted_temperature
from dfm_d2.detection.evaluation.evaluator import DetectionEvaluator, Matches
from dfm_d2.errors import UserError


def test_matches_and_d_ece_by_hand(tmp_path):
    """The first takes the object, the second repeats it, the third lies in a difficult one."""
    objects = [{"bbox": [0, 0, 10, 10], "category_id": 0}]
    objects += [{"bbox": [50, 50, 70, 70], "category_id": 0, "difficult": 1}]
    entry = {"file_name": "a.jpg", "image_id": "a", "height": 100, "width": 100, "annotations": objects}
    register("by_hand", [entry], ["cat", "dog"])
    evaluator = DetectionEvaluator("by_hand", tmp_path)
    rows = [(0, 0.875, 0, 0, 10, 9), (0, 0.5, 0, 0, 10, 10), (0, 0.75, 50, 50, 70, 70), (1, 0.25, 0, 0, 9, 9)]
    evaluator.process([{"image_id": "a"}], [{"instances": instances_of(rows)}])
    metrics, found = evaluator.evaluate()["bbox"], evaluator.matches
    assert dict(zip(found.scores, found.right)) == {0.875: True, 0.5: False, 0.25: False}
    assert found.objects == 1
    assert metrics["D-ECE"] == pytest.approx(100 * (0.125 + 0.5 + 0.25) / 3)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_scores_were_made_with_is_found(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 3, 20000)
    right = rng.random(20000) < 1 / (1 + np.exp(-logits / temperature))
    found = Matches(1 / (1 + np.exp(-logits)), right, int(right.sum()))
    assert fitted_temperature(found) == pytest.approx(temperature, rel=0.05)


def test_the_threshold_of_greatest_f1():
    # F1 from the first on: 2/5, 4/6, 4/7, 6/8, 6/9 of four objects.
    scores, right = np.array([0.3, 0.9, 0.8, 0.6, 0.5]), np.array([False, True, True, False, True])
    assert best_threshold(Matches(scores, right, 4)) == pytest.approx(0.4)
    assert best_threshold(Matches(np.zeros(0), np.zeros(0, bool), 4)) == 0


def test_a_temperature_moves_scores_and_nothing_else(make_model, make_input):
    """So that AP stays as it was; a temperature of 1 changes no bit."""
    model, inputs = make_model().eval(), [make_input("a"), make_input("b")]
    plain = [answer["instances"] for answer in model(inputs)]
    scores = torch.rand(100000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.calibrated(scores), scores)
    model.temperature.fill_(2.0)
    for answer, before in zip(model(inputs), plain, strict=True):
        found = answer["instances"]
        assert torch.equal(found.pred_boxes.tensor, before.pred_boxes.tensor) and len(found) > 0
        assert torch.equal(found.pred_classes, before.pred_classes)
        torch.testing.assert_close(found.scores, (before.scores.logit() / 2).sigmoid())
    assert model.calibrated(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_a_threshold_is_a_number_or_the_models_own(make_model, make_input):
    model = make_model().eval()
    assert chosen_threshold(model, 0.25) == 0.25
    with pytest.raises(UserError, match="has no score threshold.*: give a number, or"):
        chosen_threshold(model, "auto")
    model.threshold.fill_(0.5)
    assert chosen_threshold(model, "auto") == 0.5
