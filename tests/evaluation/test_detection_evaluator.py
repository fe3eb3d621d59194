"""The evaluator: AP is that of the real Detectron2, from committed numbers and live; by hand; files."""

import json
import math

import numpy as np
import pytest
from framework.providers import detectron2_provider
from golden_set import GOLDEN_PATH, evaluate, evaluator_of, instances_of, measure_with_detectron2, outputs_of
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dfm_d2.detection.evaluation.evaluator import format_table
from dfm_d2.detection.evaluation.voc_ap import average_precisions, match_detections
from dfm_d2.errors import UserError


@pytest.fixture
def golden():
    golden = json.loads(GOLDEN_PATH.read_text(encoding="utf-8"))
    return golden | {"classes": [*golden["classes"], "emu"]}  # the last one without ground truth


@pytest.mark.parametrize("live", [False, pytest.param(True, marks=pytest.mark.d2)])
def test_ap_is_that_of_detectron2(live, golden, tmp_path):
    del golden["classes"][-1]
    expected = golden["expected"]
    if live:
        detectron2_provider()
        expected = measure_with_detectron2(golden, tmp_path)
        assert expected["voc07"] == pytest.approx(golden["expected"]["voc07"])
        assert expected["coco"] == pytest.approx(golden["expected"]["coco"], nan_ok=True)
    ours = evaluate(evaluator_of(golden, tmp_path), outputs_of(golden))
    assert {"AP", "AP50", "AP75", "AP-cat"} <= set(expected["coco"])
    theirs = {**expected["coco"], "VOC07_AP50": expected["voc07"], "VOC_AP50": expected["voc"]}
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=0, abs=1e-6, nan_ok=True)
    assert expected["voc07"] != expected["voc"]


def test_plain_pycocotools_finds_the_same_from_the_files(golden, tmp_path):
    metadata = {"thing_dataset_id_to_contiguous_id": {7: 0, 3: 1, 90: 2, 4: 3}}
    folder = tmp_path / "inference"
    ours = evaluate(evaluator_of(golden, folder, metadata), outputs_of(golden))
    found, ground_truth = folder / "coco_instances_results.json", folder / "instances_gt.json"
    assert sorted(folder.iterdir()) == [found, ground_truth]
    assert {item["category_id"] for item in json.loads(found.read_text())} == {7, 3, 90}
    truth = COCO(str(ground_truth))
    evaluation = COCOeval(truth, truth.loadRes(str(found)), "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    assert [ours[key] for key in ("AP", "AP50", "AP75")] == pytest.approx(list(100 * evaluation.stats[:3]))
    plain = evaluate(evaluator_of(golden, tmp_path), outputs_of(golden))
    assert ours == pytest.approx(plain, nan_ok=True)  # the ids of the categories change nothing


def test_reset_forgets_no_detection_is_zero_no_ground_truth_is_nan_and_the_table(golden, tmp_path):
    evaluator = evaluator_of(golden, tmp_path)
    metrics = evaluate(evaluator, outputs_of(golden))
    assert evaluate(evaluator, outputs_of(golden))["AP"] == metrics["AP"] > 0
    lines = format_table({"bbox": metrics}).splitlines()
    assert lines[0].split() == ["class", "AP", "AP50", "VOC07_AP50", "VOC_AP50", "D-ECE"]
    assert [line.split()[0] for line in lines[2:]] == ["cat", "dog", "cow", "emu", "mean"]
    assert lines[-2].split()[1:] == ["-"] * 5 and lines[-1].split()[2] == f"{metrics['AP50']:.1f}"
    metrics = evaluate(evaluator, [])
    zero = ("AP", "AP50", "AP-cat", "VOC07_AP50", "VOC_AP50", "VOC_AP50-cow")
    assert not any(metrics[key] for key in zero) and math.isnan(metrics["AP50-emu"])
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []
    for image in golden["images"]:
        image["objects"] = []
    assert all(map(math.isnan, evaluate(evaluator_of(golden, tmp_path), outputs_of(golden)).values()))


def test_what_cannot_be_evaluated_says_so(golden, tmp_path, caplog):
    evaluator = evaluator_of(golden, tmp_path)
    with pytest.raises(ValueError, match="'zebra' is not in the data set golden_ours"):
        evaluator.process([{"image_id": "zebra"}], [{"instances": instances_of([])}])
    source = {"image_id": golden["images"][0]["image_id"]}
    with pytest.raises(UserError, match="NUM_CLASSES"):
        evaluator.process([source], [{"instances": instances_of([(4, 0.5, 0, 0, 9, 9)])}])
    rows = [(0, math.nan, 0, 0, 9, 9), (0, 0.5, 0, 0, math.inf, 9), (0, 0.5, 0, 0, 9, 9)]
    metrics = evaluate(evaluator, [(source, {"instances": instances_of(rows)})])
    assert "2 detections that are not finite" in caplog.text and metrics["AP"] == 0.0


BOX, OTHER, FAR = [0, 0, 10, 10], [20, 0, 30, 10], [60, 60, 70, 70]
CASES = [
    # In order of score TP, FP, TP of two positives: recall 1/2, 1/2, 1 and precision 1, 1/2, 2/3.
    ([BOX, OTHER], [0, 0], [(7, OTHER), (9, BOX), (8, FAR)], "TFT", ((6 + 5 * 2 / 3) / 11, 5 / 6)),
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
]


@pytest.mark.parametrize("truths, difficult, detections, outcome, expected", CASES)
def test_voc_ap_by_hand(truths, difficult, detections, outcome, expected):
    truth = {"a": (np.array(truths, float), np.array(difficult, bool))}
    boxes = np.array([box for _, box in detections], float).reshape(-1, 4)
    scores = np.array([score for score, _ in detections], float)
    found = match_detections(truth, ["a"] * len(boxes), scores, boxes)
    assert [list(matches) for matches in found] == [[o == kind for o in outcome] for kind in "TF"]
    assert average_precisions(*found, difficult.count(0)) == pytest.approx(expected, nan_ok=True)
    elsewhere = match_detections(truth, ["b"] * len(boxes), scores, boxes)
    assert not elsewhere[0].any() and elsewhere[1].all()
