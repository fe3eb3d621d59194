"""Detectron2's own scripts on a config of ours, as the documentation says to run them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from providers import detectron2_provider

from dfm_d2.detection.data.shapes import write_shapes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"""
_BASE_: {ROOT}/configs/shapes_flow_r18.yaml
MODEL:
  FPN: {{OUT_CHANNELS: 16}}
  DFM:
    NUM_PREDICTORS: 2
    NUM_PROPOSALS: 10
    HEAD: {{HIDDEN_DIM: 16, NUM_HEADS: 2, FEEDFORWARD_DIM: 16}}
DATASETS: {{VOC_ROOT: shapes}}
"""


@pytest.mark.d2
def test_analyze_model(tmp_path):
    detectron2_provider()
    script = Path(importlib.util.find_spec("detectron2").origin).parents[1] / "tools" / "analyze_model.py"
    if not script.is_file():
        pytest.skip("needs a checkout of Detectron2: an installed package lacks tools/")
    write_shapes(tmp_path / "shapes", 4, 3, 96, 0)
    (tmp_path / "config.yaml").write_text(CONFIG)
    docs = (ROOT / "docs" / "deploy.md").read_text()
    code, words = re.search(r'python -c "\n(import runpy\n.*?)\n" (--.*?)\n', docs, re.DOTALL).groups()
    code = code.replace("detectron2/tools/analyze_model.py", str(script))
    code, words = (text.replace("configs/shapes_flow_r18.yaml", "config.yaml") for text in (code, words))
    command = [sys.executable, "-W", "ignore", "-c", code, *words.split(), "MODEL.DFM.SAMPLER.STEPS", "1"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout + done.stderr
    assert "predictors.1.class_logits.weight" in said and "(6, 16)" in said, "the classes of the data set"
    assert float(re.search(r"Total GFlops: ([\d.]+)", said)[1]) > 0
    assert float(re.search(r"Total \(Million\) Activations: ([\d.]+)", said)[1]) > 0
