#!/usr/bin/env python
"""The main job end to end: generate a data set, train with sequential local updates, evaluate, draw.

python tools/demo.py [KEY VALUE ...]     overrides of configs/shapes_flow_lite0.yaml, OUTPUT_DIR among them
"""

import sys
import time
from pathlib import Path

import make_shapes
import train_net
import visualize_flow
from command_line import ROOT, argument_parser

from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.setup import load_config
from dfm_d2.errors import UserError, report

CONFIG = str(ROOT / "configs" / "shapes_flow_lite0.yaml")
SHAPES = ROOT / "data" / "shapes"
OUTPUT = ROOT / "output" / "demo"
NUMBERS = "--train 2000 --val 300 --size 128".split()


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the first part that failed, else 0."""
    parser = argument_parser(__doc__)
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the config")
    overrides = parser.parse_args(arguments).opts
    started = time.perf_counter()
    opts = ["DATASETS.VOC_ROOT", str(SHAPES), "OUTPUT_DIR", str(OUTPUT), *overrides]
    try:
        cfg = load_config(DETECTION, CONFIG, opts)
    except UserError as error:
        return report(error)
    output, command = Path(cfg.OUTPUT_DIR), ["--config-file", CONFIG, *opts]
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    status = (
        make_shapes.main(["--out", cfg.DATASETS.VOC_ROOT, *NUMBERS])
        or train_net.run_command(command)
        or visualize_flow.main(["--score", "auto", *command, *weights])
    )
    if status == 0:
        print(f"\ndone in {(time.perf_counter() - started) / 60:.1f} minutes; written:")
        names = ["model_final.pth", "metrics.json", "*.png", "*.html", "events.out.tfevents.*"]
        for path in (path for name in names for path in sorted(output.glob(name))):
            print(f"  {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
