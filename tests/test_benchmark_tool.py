"""tools/benchmark.py on both providers."""

import importlib.util
import re
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


@pytest.mark.parametrize("task", ["train", "data", "eval"])
def test_a_task_is_timed_and_leaves_no_weights(run, capsys, task):
    tool = load_tool("benchmark")
    words = ["--task", task, "--iterations", "3", "--config-file", str(run / "config.yaml")]
    assert tool.run_command(words) == 0
    said = re.search(rf"{task}: 3 iterations, median (\S+) s, (\S+) images/s", capsys.readouterr().out)
    assert float(said[1]) > 0 and float(said[2]) > 0
    assert not list(run.rglob("*.pth"))


def test_what_is_wrong_with_a_benchmark_is_one_sentence(run, capsys):
    tool = load_tool("benchmark")
    words = ["--task", "train", "--config-file", str(run / "config.yaml")]
    assert tool.run_command([*words, "DATASETS.VOC_ROOT", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and "nowhere" in error
    for more in (["--iterations", "0"], ["--eval-only"], ["--task", "eval", "--num-gpus", "2"]):
        with pytest.raises(SystemExit):
            tool.run_command([*words, *more])


def test_an_evaluation_without_a_data_set_is_one_sentence(run, capsys):
    words = ["--task", "eval", "--config-file", str(run / "config.yaml"), "DATASETS.TEST", "()"]
    assert load_tool("benchmark").run_command(words) == 2
    assert "error: DATASETS.TEST is empty" in capsys.readouterr().err
