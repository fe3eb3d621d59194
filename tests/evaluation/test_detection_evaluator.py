"""The evaluator: AP equals that of the real Detectron2, from committed numbers and live; files; edges."""

import contextlib
import io
import json
import math

import pytest
from framework.providers import detectron2_provider
from golden_set import evaluate, evaluator_of, instances_of, load_golden, outputs_of
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dfm_d2.detection.evaluation.evaluator import format_table
from dfm_d2.errors import UserError


@pytest.fixture
def golden():
    golden = load_golden()
    golden["classes"] = [*golden["classes"], "emu"]  # without ground truth
    return golden


def assert_agree(expected, tmp_path):
    golden = load_golden()
    ours = evaluate(evaluator_of(golden, tmp_path), outputs_of(golden))
    assert {"AP", "AP50", "AP75", "AP-cat"} <= set(expected["coco"])
    theirs = {**expected["coco"], "VOC07_AP50": expected["voc07"], "VOC_AP50": expected["voc"]}
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=0, abs=1e-6, nan_ok=True)
    assert expected["voc07"] != expected["voc"]


def test_golden_numbers(tmp_path):
    assert_agree(load_golden()["expected"], tmp_path)


@pytest.mark.d2
def test_live_against_detectron2(tmp_path):
    detectron2_provider()
    from detectron2_ap import measure

    golden = load_golden()
    expected = measure(golden, tmp_path)
    assert_agree(expected, tmp_path)
    assert expected["voc07"] == pytest.approx(golden["expected"]["voc07"])
    assert expected["coco"] == pytest.approx(golden["expected"]["coco"], nan_ok=True)


def test_plain_pycocotools_finds_the_same_from_the_files(golden, tmp_path):
    metadata = {"thing_dataset_id_to_contiguous_id": {7: 0, 3: 1, 90: 2, 4: 3}}
    ours = evaluate(evaluator_of(golden, tmp_path / "inference", metadata), outputs_of(golden))
    found, ground_truth = (
        tmp_path / "inference" / name for name in ("coco_instances_results.json", "instances_gt.json")
    )
    assert sorted((tmp_path / "inference").iterdir()) == [found, ground_truth]
    assert {item["category_id"] for item in json.loads(found.read_text())} == {7, 3, 90}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(ground_truth))
        evaluation = COCOeval(truth, truth.loadRes(str(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert [ours[key] for key in ("AP", "AP50", "AP75")] == pytest.approx(list(100 * evaluation.stats[:3]))
    plain = evaluate(evaluator_of(golden, tmp_path), outputs_of(golden))
    assert ours == pytest.approx(plain, nan_ok=True)  # the ids of the categories change nothing


def test_a_duplicate_of_the_first_detection_is_a_false_positive(golden, tmp_path):
    """Of two objects one is found twice: precision 1 up to recall 1/2, then 2/3."""
    golden["images"] = [{**golden["images"][0], "objects": [[0, 0, 0, 10, 10, 0], [0, 50, 50, 60, 60, 0]]}]
    rows = [(0, 0.9, 0, 0, 10, 10), (0, 0.8, 0, 0, 10, 10), (0, 0.7, 50, 50, 60, 60)]
    source = {"image_id": golden["images"][0]["image_id"]}
    metrics = evaluate(evaluator_of(golden, tmp_path), [(source, {"instances": instances_of(rows)})])
    expected = {"AP50": (51 + 50 * 2 / 3) / 101, "VOC07_AP50": (6 + 5 * 2 / 3) / 11, "VOC_AP50": 5 / 6}
    assert {key: metrics[key] / 100 for key in expected} == pytest.approx(expected)


def test_no_detection_is_zero_and_no_ground_truth_is_nan(golden, tmp_path):
    metrics = evaluate(evaluator_of(golden, tmp_path), [])
    for key in ("AP", "AP50", "AP-cat", "VOC07_AP50", "VOC_AP50", "VOC_AP50-cow"):
        assert metrics[key] == 0.0, key
    assert math.isnan(metrics["AP50-emu"])
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []
    for image in golden["images"]:
        image["objects"] = []
    assert all(map(math.isnan, evaluate(evaluator_of(golden, tmp_path), outputs_of(golden)).values()))


def test_reset_forgets_and_the_table_has_a_row_per_class_and_the_mean(golden, tmp_path):
    evaluator = evaluator_of(golden, tmp_path)
    metrics = evaluate(evaluator, outputs_of(golden))
    assert evaluate(evaluator, outputs_of(golden))["AP"] == metrics["AP"] > 0
    lines = format_table({"bbox": metrics}).splitlines()
    assert lines[0].split() == ["class", "AP", "AP50", "VOC07_AP50", "VOC_AP50"]
    assert [line.split()[0] for line in lines[2:]] == ["cat", "dog", "cow", "emu", "mean"]
    assert lines[-2].split()[1:] == ["-"] * 4
    assert lines[-1].split()[2] == f"{metrics['AP50']:.1f}"


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
