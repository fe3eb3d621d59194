"""tools/demo.py writes where it is asked to; tools/analyze_model.py counts as by hand; help is fast."""

import subprocess
import sys

import pytest
import torch
from tool_loader import ROOT, load_tool

from dfm_d2.detection.analysis import analyze

TOOLS = "analyze_model", "demo", "detect", "export_model", "make_shapes", "visualize_flow"
SMALL = (
    "SOLVER.MAX_ITER 2 SOLVER.WARMUP_ITERS 1 SOLVER.IMS_PER_BATCH 2 MODEL.DEVICE cpu "
    "MODEL.FPN.OUT_CHANNELS 16 MODEL.DFM.NUM_PREDICTORS 2 MODEL.DFM.NUM_PROPOSALS 10 "
    "MODEL.DFM.SAMPLER.STEPS 2 MODEL.DFM.HEAD.HIDDEN_DIM 16 MODEL.DFM.HEAD.NUM_HEADS 2 "
    "MODEL.DFM.HEAD.FEEDFORWARD_DIM 16"
).split()


def test_the_demo_trains_and_draws_in_the_folder_that_is_asked_for(tmp_path, monkeypatch, capsys):
    demo, out, shapes = load_tool("demo"), tmp_path / "x", tmp_path / "shapes"
    monkeypatch.setattr(demo, "NUMBERS", "--train 12 --val 2 --size 96".split())
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "default")
    words = ["OUTPUT_DIR", str(out), "DATASETS.VOC_ROOT", str(shapes)]
    assert demo.main([*words, "SOLVER.NOTHING", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "SOLVER.NOTHING" in error and error.count("\n") == 1
    assert not out.exists() and demo.main([*SMALL, *words]) == 0
    assert not (tmp_path / "default").exists() and (shapes / "JPEGImages").is_dir()
    pictures = {"predictions.png", "flow.png", "curves.png"}
    assert pictures | {"model_final.pth", "config.yaml"} <= {path.name for path in out.iterdir()}
    written = capsys.readouterr().out.split("written:")[1]
    assert f"  {out / 'model_final.pth'}\n" in written and f"  {out / 'curves.png'}\n" in written


# Runs commands in one process: each tool by its name, then its words.
COMMANDS = """
import runpy, sys
sys.path.insert(0, "tools")
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(f"tools/{sys.argv[0]}.py", run_name="__main__")
    except SystemExit as done:
        assert (done.code or 0) == (0 if "--help" in sys.argv else 2), command
    assert "torch" not in sys.modules, command
"""
CONFIG = "configs/shapes_flow_r18.yaml"
MISTAKES = {
    "analyze_model": "arguments are required: --config-file",
    "export_model": "arguments are required: --config-file",
    f"detect --config-file {CONFIG} --output x --input x.jpg --weights {CONFIG}": "x.jpg does not exist",
    f"detect --config-file {CONFIG} --output x --input {CONFIG} --weights a.pth": "no weight file a.pth",
    f"export_model --config-file {CONFIG} MODEL.WEIGHTS b.pth": "no weight file b.pth",
    f"export_model --config-file {CONFIG} --sample-image y.jpg MODEL.WEIGHTS {CONFIG}": "y.jpg cannot be",
    f"visualize_flow --config-file {CONFIG} MODEL.WEIGHTS c.pth": "no weight file c.pth",
    f"visualize_flow --config-file {CONFIG}": "MODEL.WEIGHTS is empty",
    f"visualize_flow --config-file {CONFIG} --image z.jpg MODEL.WEIGHTS {CONFIG}": "z.jpg is not a readable",
}


def test_help_and_mistakes_need_no_torch():
    commands = [*(f"{name} --help" for name in TOOLS), *MISTAKES]
    run = [sys.executable, "-c", COMMANDS, *commands]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: {name}.py" in done.stdout for name in TOOLS)
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert all(said in error for said, error in zip(MISTAKES.values(), errors, strict=True)), errors


def test_a_detector_by_hand(make_model):
    model = make_model(SAMPLER__STEPS=3, HEAD__INTERACTION="grid_linear").eval()
    costs = {cost.part: cost for cost in analyze(model, torch.zeros(3, 64, 96))}
    # N = 12, C = 16, P = 3, S = 2, hidden 32; the layers of dfm_d2/detection/head.py. Class logits of a step
    # that is not the last are not used, and so not computed by a graph.
    n, c, cells, hidden = 12, 16, 9, 32
    assert costs["RoIAlign"].multiply_adds == 3 * n * cells * (2 * 2 * 4) * c
    by_hand = n * c * 3 * c + 2 * n * n * c + n * c * c  # attention
    by_hand += n * (4 * c + c * c)  # boxes
    by_hand += n * (cells * c * c + c * 2 * c)  # interaction
    by_hand += c * 2 * c + 2 * c * c + c * 2 * c  # time
    by_hand += n * (2 * c * hidden + c * c + c * 4)  # feedforward and towers
    assert costs["predictor 0"].multiply_adds == by_hand + 6 * 5 * n * c  # norms
    # The parts add up.
    total = costs.pop("total")
    assert list(costs) == ["backbone", "FPN", "RoIAlign", "predictor 0", "predictor 1", "predictor 2"]
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(cost.parameters for cost in costs.values()) == total.parameters == parameters
    assert sum(cost.activations for cost in costs.values()) == total.activations
    # What is outside of the parts: normalising pixels, moving boxes.
    assert sum(cost.multiply_adds for cost in costs.values()) == pytest.approx(total.multiply_adds, rel=0.01)


def test_the_tool_prints_both_twins(capsys):
    tool, config = load_tool("analyze_model"), ["--config-file", str(ROOT / "configs/shapes_flow_r18.yaml")]
    words = "--size 64 64 MODEL.DFM.NUM_PREDICTORS 2 MODEL.DFM.SAMPLER.STEPS 2".split()
    assert tool.main([*config, *words]) == 0
    out = capsys.readouterr().out
    assert "FlowDetector, 2 steps, N = 40" in out and "CascadeDetector, 1 steps, N = 40" in out
    assert out.count("predictor 1") == 2 and out.count("total") == 2
    assert tool.main([*config, "MODEL.NOTHING", "1"]) == 2
    assert "MODEL.NOTHING" in capsys.readouterr().err
