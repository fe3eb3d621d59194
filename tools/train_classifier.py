#!/usr/bin/env python
"""Train and evaluate a classifier by local flow losses, backprop or Forward-Forward (UPDATE.METHOD).

python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml
python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml UPDATE.METHOD backprop
python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml --resume
python tools/train_classifier.py --config-file configs/digits_flow_cnn.yaml --eval-only MODEL.WEIGHTS a.pth
"""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.classification.task import CLASSIFICATION  # noqa: E402
from dfm_d2.engine.setup import run_tool  # noqa: E402

# Of a list of arguments (None: those of this process), the exit status: 0 done, 2 something that the user can
# put right, 1 training became non-finite.
run_command = partial(run_tool, CLASSIFICATION)

if __name__ == "__main__":
    sys.exit(run_command())
