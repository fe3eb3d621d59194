"""tools/analyze_model.py: its counts are those that can be worked out by hand."""

import pytest
import torch
from tool_loader import ROOT, load_tool

from dfm_d2.detection.analysis import analyze


def test_a_detector_by_hand(make_model):
    model = make_model(SAMPLER__STEPS=3, HEAD__INTERACTION="grid_linear").eval()
    costs = {cost.part: cost for cost in analyze(model, torch.zeros(3, 64, 96))}
    # N = 12, C = 16, P = 3, S = 2, hidden 32; the layers of dfm_d2/detection/head.py. Class logits of a step
    # that is not the last are not used, and so not computed by a graph.
    n, c, cells, hidden = 12, 16, 9, 32
    assert costs["RoIAlign"].multiply_adds == 3 * n * cells * (2 * 2 * 4) * c
    attention = n * c * 3 * c + 2 * n * n * c + n * c * c
    boxes = n * (4 * c + c * c)
    interaction = n * (cells * c * c + c * 2 * c)
    time = c * 2 * c + 2 * c * c + c * 2 * c
    feedforward_and_towers = n * (2 * c * hidden + c * c + c * 4)
    linear = attention + boxes + interaction + time + feedforward_and_towers
    norms = 6 * 5 * n * c
    assert costs["predictor 0"].multiply_adds == linear + norms
    # The parts add up.
    total = costs.pop("total")
    assert list(costs) == ["backbone", "FPN", "RoIAlign", "predictor 0", "predictor 1", "predictor 2"]
    assert sum(cost.parameters for cost in costs.values()) == total.parameters
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert sum(cost.activations for cost in costs.values()) == total.activations
    # What is outside of the parts: normalising pixels, moving boxes.
    assert sum(cost.multiply_adds for cost in costs.values()) == pytest.approx(total.multiply_adds, rel=0.01)


def test_the_tool_prints_both_twins(capsys):
    tool, config = load_tool("analyze_model"), str(ROOT / "configs" / "shapes_flow_r18.yaml")
    words = ["--config-file", config, "--size", "64", "64"]
    words += "MODEL.DFM.NUM_PREDICTORS 2 MODEL.DFM.SAMPLER.STEPS 2".split()
    assert tool.main(words) == 0
    out = capsys.readouterr().out
    assert "FlowDetector, 2 steps, N = 40" in out and "CascadeDetector, 1 steps, N = 40" in out
    assert out.count("predictor 1") == 2 and out.count("total") == 2
    assert tool.main(["--config-file", config, "MODEL.NOTHING", "1"]) == 2
    assert "MODEL.NOTHING" in capsys.readouterr().err
