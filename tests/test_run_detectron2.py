"""Detectron2's own scripts through tools/run_detectron2.py."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfm_d2.detection.data.shapes import write_shapes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with shapes/ and config.yaml."""
    folder = tmp_path_factory.mktemp("run")
    write_shapes(folder / "shapes", 4, 3, 96, 0)
    (folder / "config.yaml").write_text(f"""
_BASE_: {ROOT}/configs/shapes_flow_r18.yaml
MODEL:
  DEVICE: cpu
  FPN: {{OUT_CHANNELS: 16}}
  DFM:
    NUM_CLASSES: 0
    NUM_PREDICTORS: 2
    NUM_PROPOSALS: 10
    HEAD: {{HIDDEN_DIM: 16, NUM_HEADS: 2, FEEDFORWARD_DIM: 16}}
    SAMPLER: {{STEPS: 2}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 4, WARMUP_ITERS: 1}}
DATASETS: {{VOC_ROOT: "{folder}/shapes"}}
OUTPUT_DIR: "{folder}"
""")
    return folder


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_run_detectron2_names_what_is_missing(run, capsys):
    tool = load_tool("run_detectron2")
    assert tool.main(["analyze_model.py", "--tasks", "flop"]) == 2
    assert "--config-file is missing" in capsys.readouterr().err
    assert tool.main(["no_script.py", "--config-file", str(run / "config.yaml")]) == 2
    assert "no_script.py does not exist" in capsys.readouterr().err


def test_run_detectron2_without_detectron2(run, tmp_path):
    """In a process where the builtin framework is chosen."""
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('it ran')\n")
    done = in_process(script, ["--config-file", str(run / "config.yaml")], DFM_FRAMEWORK="builtin")
    assert done.returncode == 2 and "needs Detectron2" in done.stderr.splitlines()[-1]


@pytest.mark.d2
def test_detectron2s_own_analysis_runs_on_a_config_of_ours(run):
    detectron2 = detectron2_checkout()
    words = ["--num-inputs", "2", "--tasks", "flop", "activation", "parameter", "structure"]
    words += ["--config-file", str(run / "config.yaml"), "MODEL.DFM.SAMPLER.STEPS", "1"]
    done = in_process(detectron2 / "tools" / "analyze_model.py", words)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout + done.stderr
    assert "predictors.1.class_logits.weight" in said and "(6, 16)" in said, "the classes of the data set"
    assert float(re.search(r"Total GFlops: ([\d.]+)", said)[1]) > 0
    assert float(re.search(r"Total \(Million\) Activations: ([\d.]+)", said)[1]) > 0


def detectron2_checkout() -> Path:
    """The checkout that detectron2 is imported from; its tools/ is no part of an installed package."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None:
        if os.environ.get("DFM_REQUIRE_D2") == "1":
            pytest.fail("DFM_REQUIRE_D2=1, but Detectron2 is not installed (requirements-detectron2.txt)")
        pytest.skip("needs the real Detectron2 (requirements-detectron2.txt)")
    root = Path(spec.origin).resolve().parents[1]
    if not (root / "tools" / "analyze_model.py").is_file():
        pytest.skip("needs a checkout of Detectron2: an installed package lacks tools/")
    return root


def in_process(script: Path, words: list[str], **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "run_detectron2.py"), str(script), *words]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
