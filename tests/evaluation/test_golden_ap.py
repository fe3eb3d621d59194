"""Our AP equals that of the real Detectron2: from committed numbers, and live where it is installed."""

import importlib.util
import os

import numpy as np
import pytest
from golden_set import dataset_dicts, load_golden, outputs_of, register

from dfm_d2.detection.evaluation.evaluator import DetectionEvaluator


def our_metrics(golden):
    dicts = dataset_dicts(golden, difficult_is_crowd=False)
    register("golden_ours", dicts, golden["classes"])
    evaluator = DetectionEvaluator("golden_ours")
    evaluator.reset()
    for source, output in outputs_of(golden):
        evaluator.process([source], [output])
    return evaluator.evaluate()["bbox"]


def assert_agree(ours, expected):
    assert {"AP", "AP50", "AP75", "AP-cat"} <= set(expected["coco"])
    for key, value in expected["coco"].items():
        np.testing.assert_allclose(ours[key], value, atol=1e-6, err_msg=key)
    assert ours["VOC07_AP50"] == pytest.approx(expected["voc07"], abs=1e-6)
    assert ours["VOC_AP50"] == pytest.approx(expected["voc"], abs=1e-6)
    assert expected["voc07"] != expected["voc"]


def test_golden_numbers():
    golden = load_golden()
    assert_agree(our_metrics(golden), golden["expected"])


@pytest.mark.d2
def test_live_against_detectron2(tmp_path):
    if importlib.util.find_spec("detectron2") is None:
        if os.environ.get("DFM_REQUIRE_D2") == "1":
            pytest.fail("DFM_REQUIRE_D2=1, but detectron2 is not installed")
        pytest.skip("detectron2 is not installed")
    from detectron2_ap import measure

    golden = load_golden()
    expected = measure(golden, tmp_path)
    assert_agree(our_metrics(golden), expected)
    assert expected["voc07"] == pytest.approx(golden["expected"]["voc07"])
    for key, value in golden["expected"]["coco"].items():
        np.testing.assert_allclose(expected["coco"][key], value, err_msg=key)
