"""VOC AP by hand-made cases, and what must hold of any."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfm_d2.detection.evaluation.voc_ap import average_precisions, box_iou, match_detections

BOX, OTHER, FAR = [0, 0, 10, 10], [20, 0, 30, 10], [60, 60, 70, 70]


@pytest.mark.parametrize(
    "truths, difficult, detections, outcome, expected",
    [
        # In order of score TP, FP, TP of two positives: recall 1/2, 1/2, 1 and precision 1, 1/2, 2/3.
        (
            [BOX, OTHER],
            [0, 0],
            [(7, OTHER), (9, BOX), (8, FAR)],
            "TFT",
            ((6 + 5 * 2 / 3) / 11, 1 / 2 + 1 / 3),
        ),
        # A duplicate is a false positive.
        ([BOX], [0], [(9, BOX), (8, [0, 0, 10, 9])], "TF", (1, 1)),
        # What is difficult counts neither way, however often it is found.
        ([BOX, OTHER], [1, 0], [(9, BOX), (8, BOX), (7, OTHER)], "--T", (1, 1)),
        # An overlap equal to the threshold matches, a smaller one does not.
        ([BOX], [0], [(9, [0, 0, 10, 5])], "T", (1, 1)),
        ([BOX], [0], [(9, [0, 0, 10, 4.9])], "F", (0, 0)),
        # Nothing to find is NaN, nothing found is 0.
        ([BOX], [1], [], "", (math.nan, math.nan)),
        ([BOX], [0], [], "", (0, 0)),
    ],
)
def test_by_hand(truths, difficult, detections, outcome, expected):
    truth = {"a": (np.array(truths, float), np.array(difficult, bool))}
    boxes = np.array([box for _, box in detections], float).reshape(-1, 4)
    scores = np.array([score for score, _ in detections], float)
    found = match_detections(truth, ["a"] * len(boxes), scores, boxes)
    assert [list(matches) for matches in found] == [[o == kind for o in outcome] for kind in "TF"]
    assert average_precisions(*found, difficult.count(0)) == pytest.approx(expected, nan_ok=True)
    elsewhere = match_detections(truth, ["b"] * len(boxes), scores, boxes)
    assert not elsewhere[0].any() and elsewhere[1].all()


def test_iou_is_that_of_the_inclusive_convention():
    first, second = [48, 240, 195, 371], [100, 200, 240, 320]  # as written in XML
    inclusive = (195 - 100 + 1) * (320 - 240 + 1)
    union = (195 - 48 + 1) * (371 - 240 + 1) + (240 - 100 + 1) * (320 - 200 + 1) - inclusive
    ours = [np.array([box[0] - 1, box[1] - 1, box[2], box[3]], float) for box in (first, second)]
    assert box_iou(ours[0], ours[1][None])[0] == pytest.approx(inclusive / union)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=30), st.integers(0, 10))
def test_ap_is_within_bounds_and_a_last_miss_costs_nothing(hits, missed):
    hits, longer = np.array(hits, dtype=bool), np.array([*hits, False])
    positives = int(hits.sum()) + missed
    values = average_precisions(hits, ~hits, positives)
    assert average_precisions(longer, ~longer, positives) == pytest.approx(values, nan_ok=True)
    for value in values:
        assert math.isnan(value) if positives == 0 else 0.0 <= value <= 1.0
        assert value == pytest.approx(1.0) or not (hits.all() and missed == 0 and positives)
