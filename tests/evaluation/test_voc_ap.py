"""VOC AP by hand-made cases, and what must hold of any."""

import math

import numpy as np
import pytest

from dfm_d2.detection.evaluation.voc_ap import average_precisions, match_detections

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
