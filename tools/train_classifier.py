#!/usr/bin/env python
"""Train and evaluate a classifier by local flow losses, backprop or Forward-Forward (UPDATE.METHOD).

python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml
python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml UPDATE.METHOD backprop
python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml --resume
python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml --eval-only MODEL.WEIGHTS a.pth
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.classification.training_pictures import write_class_pictures  # noqa: E402
from dfm_d2.classification.task import CLASSIFICATION  # noqa: E402
from dfm_d2.engine.launch import run_tool  # noqa: E402
from dfm_d2.engine.run import evaluate_only, train  # noqa: E402
from dfm_d2.engine.setup import load_config, setup_run  # noqa: E402
from dfm_d2.framework import comm  # noqa: E402


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run what the arguments of ``default_argument_parser`` say; returns {"accuracy": ..., ...}.

    Raises UserError, one sentence, for whatever the user can put right.
    """
    cfg = load_config(CLASSIFICATION, args.config_file, args.opts)
    classes = setup_run(CLASSIFICATION, cfg, args)
    if args.eval_only:
        return evaluate_only(CLASSIFICATION, cfg, classes, args.resume)
    results = train(CLASSIFICATION, cfg, classes, args.resume)
    if comm.is_main_process():
        write_class_pictures(cfg, classes)
    return results


def run_command(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right, 1 training became non-finite."""
    return run_tool(main, partial(load_config, CLASSIFICATION), arguments)


if __name__ == "__main__":
    sys.exit(run_command())
