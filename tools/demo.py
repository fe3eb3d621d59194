#!/usr/bin/env python
"""The main job end to end: generate a data set, train with sequential local updates, evaluate, draw.

python tools/demo.py [KEY VALUE ...]     overrides of configs/shapes_flow_r18.yaml, OUTPUT_DIR among them
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")]

import make_shapes  # noqa: E402
import train_net  # noqa: E402
import visualize_flow  # noqa: E402

from dfm_d2.detection.task import DETECTION  # noqa: E402
from dfm_d2.engine.setup import load_config  # noqa: E402
from dfm_d2.errors import UserError, report  # noqa: E402

CONFIG = str(ROOT / "configs" / "shapes_flow_r18.yaml")
SHAPES = ROOT / "data" / "shapes"
OUTPUT = ROOT / "output" / "demo"
NUM_TRAIN, NUM_VAL, IMAGE_SIZE = 2000, 300, 128


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the first part that failed, else 0."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the config")
    overrides = parser.parse_args(arguments).opts
    started = time.perf_counter()
    opts = ["DATASETS.VOC_ROOT", str(SHAPES), "OUTPUT_DIR", str(OUTPUT), *overrides]
    try:
        cfg = load_config(DETECTION, CONFIG, opts)
    except UserError as error:
        return report(error)
    output, command = Path(cfg.OUTPUT_DIR), ["--config-file", CONFIG, *opts]
    numbers = ["--train", str(NUM_TRAIN), "--val", str(NUM_VAL), "--size", str(IMAGE_SIZE)]
    status = (
        make_shapes.main(["--out", cfg.DATASETS.VOC_ROOT, *numbers])
        or train_net.run_command(command)
        or visualize_flow.main([*command, "MODEL.WEIGHTS", str(output / "model_final.pth")])
    )
    if status == 0:
        print(f"\ndone in {(time.perf_counter() - started) / 60:.1f} minutes; written:")
        names = ["model_final.pth", "metrics.json", "*.png", "*.html", "events.out.tfevents.*"]
        for path in (path for name in names for path in sorted(output.glob(name))):
            print(f"  {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
