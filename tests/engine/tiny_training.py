"""Train a tiny detector in real processes; for the tests of several processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools/train_net.py")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
# GroupNorm: batch norm's statistics are a process's own. SGD: AdamW amplifies rounding.
TINY = (
    "SEED 1 SOLVER.IMS_PER_BATCH 4 SOLVER.LOG_PERIOD 1 MODEL.DFM.NUM_PREDICTORS 2 MODEL.DFM.NUM_PROPOSALS 8 "
    "MODEL.DFM.HEAD.FEEDFORWARD_DIM 32 TEST.EVAL_PERIOD 0 DATALOADER.NUM_WORKERS 0 SOLVER.OPTIMIZER sgd "
    "SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR SOLVER.STEPS () "
    "SOLVER.BASE_LR 0.001 SOLVER.WARMUP_ITERS 0 SOLVER.AMP.ENABLED False MODEL.RESNETS.NORM GN "
    "MODEL.FPN.NORM GN MODEL.DEVICE cpu"
).split()


def command(shapes: Path, out: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """Arguments KEY=VALUE are overrides, the others flags."""
    config = ["--config-file", str(ROOT / "configs/shapes_flow_r18.yaml")]
    flags = [a for a in arguments if "=" not in a]
    options = [part for a in arguments if "=" in a for part in a.split("=")]
    data = ["DATASETS.VOC_ROOT", str(shapes), "OUTPUT_DIR", str(out)]
    return [sys.executable, *launcher, TOOL, *config, *flags, *TINY, *data, *options]


def run(arguments: list[str], status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(arguments, capture_output=True, text=True, env=ONE_THREAD, timeout=240)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def parameters(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model_final.pth", weights_only=True)["model"]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for float32: a convolution rounds differently with another number of images, and a ReLU at
    its kink carries that into the gradient. grid_training.py compares in float64, to 1e-9."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm()
        assert error <= 1e-3 * value.norm() + 1e-8, f"{name}: {error / value.norm():.2e}"
