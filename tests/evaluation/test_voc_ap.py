"""VOC AP by hand-made cases, and what must hold of any."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfm_d2.detection.evaluation.voc_ap import (
    ClassDetections,
    ClassGroundTruth,
    average_precision,
    box_iou,
    match_detections,
    voc_average_precisions,
)

BOX, OTHER, FAR = [0, 0, 10, 10], [20, 0, 30, 10], [60, 60, 70, 70]


def truth(*boxes, difficult=()):
    return ClassGroundTruth(np.array(boxes, float), np.isin(np.arange(len(boxes)), difficult))


def found(*rows):
    """rows: (image, score, box)"""
    images, scores, boxes = zip(*rows) if rows else ((), (), ())
    return ClassDetections(list(images), np.array(scores, float), np.array(boxes, float).reshape(-1, 4))


def test_by_hand():
    """TP, FP, TP of two positives: recall 1/2, 1/2, 1 and precision 1, 1/2, 2/3."""
    detections = found(("a", 0.7, OTHER), ("a", 0.9, BOX), ("a", 0.8, FAR))
    eleven, area = voc_average_precisions({"a": truth(BOX, OTHER)}, detections)
    assert area == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert eleven == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_a_duplicate_is_a_false_positive():
    detections = found(("a", 0.9, BOX), ("a", 0.8, [0, 0, 10, 9]))
    hits, misses = match_detections({"a": truth(BOX)}, detections, 0.5)
    assert hits.tolist() == [True, False] and misses.tolist() == [False, True]


def test_difficult_counts_neither_way_however_often():
    detections = found(("a", 0.9, BOX), ("a", 0.8, BOX), ("a", 0.7, OTHER))
    truths = {"a": truth(BOX, OTHER, difficult=[0])}
    hits, misses = match_detections(truths, detections, 0.5)
    assert hits.tolist() == [False, False, True] and not misses.any()
    assert voc_average_precisions(truths, detections) == (1.0, 1.0)


def test_an_overlap_equal_to_the_threshold_matches():
    hits, _ = match_detections({"a": truth(BOX)}, found(("a", 0.9, [0, 0, 10, 5])), 0.5)
    assert hits.tolist() == [True]


def test_other_images_do_not_help():
    hits, misses = match_detections({"a": truth(BOX)}, found(("b", 0.9, BOX)), 0.5)
    assert not hits.any() and misses.all()


def test_nothing_to_find_is_nan_and_nothing_found_is_zero():
    assert np.isnan(voc_average_precisions({}, found(("a", 0.9, BOX)))).all()
    assert np.isnan(voc_average_precisions({"a": truth(BOX, difficult=[0])}, found())).all()
    assert voc_average_precisions({"a": truth(BOX)}, found()) == (0.0, 0.0)


def test_iou_is_that_of_the_inclusive_convention():
    first, second = [48, 240, 195, 371], [100, 200, 240, 320]  # as written in XML
    inclusive = (195 - 100 + 1) * (320 - 240 + 1)
    union = (195 - 48 + 1) * (371 - 240 + 1) + (240 - 100 + 1) * (320 - 200 + 1) - inclusive
    ours = [np.array([box[0] - 1, box[1] - 1, box[2], box[3]], float) for box in (first, second)]
    assert box_iou(ours[0], ours[1][None])[0] == pytest.approx(inclusive / union)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=30), st.integers(0, 10), st.booleans())
def test_ap_is_within_bounds_and_a_last_miss_costs_nothing(hits, missed, eleven_points):
    hits = np.array(hits, dtype=bool)
    positives = int(hits.sum()) + missed
    value = average_precision(hits, ~hits, positives, eleven_points)
    if positives == 0:
        assert np.isnan(value)
        return
    assert 0.0 <= value <= 1.0
    longer = np.append(hits, False)
    assert average_precision(longer, ~longer, positives, eleven_points) == pytest.approx(value)
    if hits.all() and missed == 0:
        assert value == pytest.approx(1.0)
