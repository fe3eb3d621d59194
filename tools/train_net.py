#!/usr/bin/env python
"""Train and evaluate a detector, with Detectron2's conventions.

python tools/train_net.py --config-file configs/voc_flow_r50.yaml
python tools/train_net.py --config-file configs/voc_flow_r50.yaml --resume
python tools/train_net.py --config-file configs/voc_flow_r50.yaml --num-gpus 8     (or under torchrun)
python tools/train_net.py --config-file configs/voc_flow_r50.yaml --eval-only MODEL.WEIGHTS model_final.pth
"""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.detection.task import DETECTION  # noqa: E402
from dfm_d2.engine.setup import run_tool  # noqa: E402

# Of a list of arguments (None: those of this process), the exit status: 0 done, 2 something that the user can
# put right, 1 training became non-finite.
run_command = partial(run_tool, DETECTION)

if __name__ == "__main__":
    sys.exit(run_command())
