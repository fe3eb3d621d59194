#!/usr/bin/env python
"""Train and evaluate a classifier by local flow losses, backprop or Forward-Forward (UPDATE.METHOD).

python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml
python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml UPDATE.METHOD backprop
python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml --resume
python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml --eval-only MODEL.WEIGHTS a.pth
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.classification.task import CLASSIFICATION  # noqa: E402
from dfm_d2.engine.setup import run_task, run_tool  # noqa: E402


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run what the arguments say, in each process; returns {"accuracy": ..., ...}. Raises UserError."""
    return run_task(CLASSIFICATION, args)


def run_command(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right, 1 training became non-finite."""
    return run_tool(CLASSIFICATION, main, arguments)


if __name__ == "__main__":
    sys.exit(run_command())
