"""tools/analyze_model.py: its counts are those that can be worked out by hand."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dfm_d2.detection.analysis import analyze

TOOL = Path(__file__).resolve().parents[1] / "tools" / "analyze_model.py"


def costs_of(model):
    return {cost.room: cost for cost in analyze(model, torch.zeros(3, 64, 96))}


def test_rooms_add_up(make_model):
    model = make_model(SAMPLER__STEPS=3).eval()
    costs = costs_of(model)
    total = costs.pop("total")
    assert list(costs) == ["backbone", "FPN", "RoIAlign", "predictor 0", "predictor 1", "predictor 2"]
    assert sum(cost.parameters for cost in costs.values()) == total.parameters
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert sum(cost.activations for cost in costs.values()) == total.activations
    # What is outside of the rooms: normalising pixels, moving boxes.
    assert sum(cost.multiply_adds for cost in costs.values()) == pytest.approx(total.multiply_adds, rel=0.01)


def test_a_predictor_by_hand(make_model):
    model = make_model(SAMPLER__STEPS=3, HEAD__INTERACTION="grid_linear").eval()
    costs = costs_of(model)
    # N = 12, C = 16, P = 3, S = 2, hidden 32; the layers of dfm_d2/predictors/flow_head.py. Class logits of a
    # step that is not the last are not used, and so not computed by a graph.
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


def test_the_tool_prints_both_twins(capsys):
    spec = importlib.util.spec_from_file_location("analyze_model", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    config = str(TOOL.parents[1] / "configs" / "shapes_flow_r18.yaml")
    words = ["--config-file", config, "--size", "64", "64", "MODEL.DFM.SAMPLER.STEPS", "4"]
    assert tool.main(words) == 0
    out = capsys.readouterr().out
    assert "FlowDetector, 4 steps, N = 40" in out and "CascadeDetector, 1 steps, N = 40" in out
    assert out.count("predictor 3") == 2 and out.count("total") == 2
    assert tool.main(["--config-file", config, "MODEL.NOTHING", "1"]) == 2
    assert "MODEL.NOTHING" in capsys.readouterr().err
