"""Our AP equals that of the real Detectron2: from committed numbers, and live where it is installed."""

import importlib.util
import os

import pytest
from golden_set import evaluate, evaluator_of, load_golden, outputs_of


def assert_agree(ours, expected):
    assert {"AP", "AP50", "AP75", "AP-cat"} <= set(expected["coco"])
    theirs = {**expected["coco"], "VOC07_AP50": expected["voc07"], "VOC_AP50": expected["voc"]}
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=0, abs=1e-6, nan_ok=True)
    assert expected["voc07"] != expected["voc"]


def test_golden_numbers():
    golden = load_golden()
    assert_agree(evaluate(evaluator_of(golden), outputs_of(golden)), golden["expected"])


@pytest.mark.d2
def test_live_against_detectron2(tmp_path):
    if importlib.util.find_spec("detectron2") is None:
        if os.environ.get("DFM_REQUIRE_D2") == "1":
            pytest.fail("DFM_REQUIRE_D2=1, but detectron2 is not installed")
        pytest.skip("detectron2 is not installed")
    from detectron2_ap import measure

    golden = load_golden()
    expected = measure(golden, tmp_path)
    assert_agree(evaluate(evaluator_of(golden), outputs_of(golden)), expected)
    assert expected["voc07"] == pytest.approx(golden["expected"]["voc07"])
    assert expected["coco"] == pytest.approx(golden["expected"]["coco"], nan_ok=True)
