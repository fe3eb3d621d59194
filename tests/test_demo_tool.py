"""tools/demo.py: all of it in one folder, the one that is asked for. The help of the tools needs no torch."""

import subprocess
import sys

import pytest
from tool_loader import ROOT, load_tool

TOOLS = "analyze_model", "demo", "detect", "export_model", "make_shapes", "visualize_flow"
SMALL = (
    "SOLVER.MAX_ITER 2 SOLVER.WARMUP_ITERS 1 SOLVER.IMS_PER_BATCH 2 MODEL.DEVICE cpu "
    "MODEL.FPN.OUT_CHANNELS 16 MODEL.DFM.NUM_PREDICTORS 2 MODEL.DFM.NUM_PROPOSALS 10 "
    "MODEL.DFM.HEAD.HIDDEN_DIM 16 MODEL.DFM.HEAD.NUM_HEADS 2 "
    "MODEL.DFM.HEAD.FEEDFORWARD_DIM 16 MODEL.DFM.SAMPLER.STEPS 2"
).split()


@pytest.fixture
def demo(monkeypatch):
    """tools/demo.py as a module, with a few images."""
    monkeypatch.setattr(load_tool("demo"), "NUMBERS", "--train 4 --val 2 --size 96".split())
    return load_tool("demo")


def test_it_trains_and_draws_in_the_folder_that_is_asked_for(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "default")
    out, shapes = tmp_path / "x", tmp_path / "shapes"
    words = ["OUTPUT_DIR", str(out), "DATASETS.VOC_ROOT", str(shapes)]
    assert demo.main([*SMALL, *words]) == 0
    assert not (tmp_path / "default").exists() and (shapes / "JPEGImages").is_dir()
    pictures = {"predictions.png", "flow.png", "curves.png"}
    assert pictures | {"model_final.pth", "config.yaml"} <= {path.name for path in out.iterdir()}
    written = capsys.readouterr().out.split("written:")[1]
    assert f"  {out / 'model_final.pth'}\n" in written and f"  {out / 'curves.png'}\n" in written


def test_a_key_that_is_not_there_is_one_error_message(demo, tmp_path, capsys):
    assert demo.main(["OUTPUT_DIR", str(tmp_path / "x"), "SOLVER.NOTHING", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "SOLVER.NOTHING" in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


HELP = """
import os.path, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
for tool in sys.argv[1:]:
    sys.argv = [tool, "--help"]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as done:
        assert not done.code, tool
    assert "torch" not in sys.modules, tool
"""


def test_help_needs_no_torch():
    command = [sys.executable, "-c", HELP, *(str(ROOT / "tools" / f"{name}.py") for name in TOOLS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: {name}.py" in done.stdout for name in TOOLS)
