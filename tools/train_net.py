#!/usr/bin/env python
"""Train and evaluate a detector, with Detectron2's conventions.

python tools/train_net.py --config-file configs/voc_flow_r50.yaml
python tools/train_net.py --config-file configs/voc_flow_r50.yaml --resume
python tools/train_net.py --config-file configs/voc_flow_r50.yaml --num-gpus 8     (or under torchrun)
python tools/train_net.py --config-file configs/voc_flow_r50.yaml --eval-only MODEL.WEIGHTS model_final.pth
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.detection.task import DETECTION  # noqa: E402
from dfm_d2.engine.setup import run_task, run_tool  # noqa: E402


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run what the arguments say, in each process; returns {"bbox": {"AP": ..., ...}}. Raises UserError."""
    return run_task(DETECTION, args)


def run_command(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right, 1 training became non-finite."""
    return run_tool(DETECTION, main, arguments)


if __name__ == "__main__":
    sys.exit(run_command())
