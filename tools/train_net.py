#!/usr/bin/env python
"""Train and evaluate, with Detectron2's conventions.

python tools/train_net.py --config-file configs/voc_flow_r50.yaml
python tools/train_net.py --config-file configs/voc_flow_r50.yaml --resume
python tools/train_net.py --config-file configs/voc_flow_r50.yaml --num-gpus 8     (or under torchrun)
python tools/train_net.py --config-file configs/voc_flow_r50.yaml --eval-only MODEL.WEIGHTS model_final.pth
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

import dfm_d2.registry  # noqa: E402, F401  (registers the meta-architectures)
from dfm_d2.detection.task import DETECTION  # noqa: E402
from dfm_d2.engine.launch import run_tool  # noqa: E402
from dfm_d2.engine.run import evaluate_only, train  # noqa: E402
from dfm_d2.engine.setup import load_config, setup_run  # noqa: E402


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run what the arguments of ``default_argument_parser`` say; returns {"bbox": {"AP": ..., ...}}.

    Raises UserError, one sentence, for whatever the user can put right.
    """
    cfg = load_config(DETECTION, args.config_file, args.opts)
    classes = setup_run(DETECTION, cfg, args)
    if args.eval_only:
        return evaluate_only(DETECTION, cfg, classes, args.resume)
    return train(DETECTION, cfg, classes, args.resume)


def run_command(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right, 1 training became non-finite."""
    return run_tool(main, partial(load_config, DETECTION), arguments)


if __name__ == "__main__":
    sys.exit(run_command())
