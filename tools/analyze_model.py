#!/usr/bin/env python
"""Parameters, multiply-adds and activations of a config's detector, part by part, beside its cascade twin.

python tools/analyze_model.py --config-file configs/voc_flow_r50.yaml --size 800 1088 [KEY VALUE ...]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.errors import exit_status  # noqa: E402

TWIN = "MODEL.META_ARCHITECTURE CascadeDetector MODEL.DFM.UPDATE joint MODEL.DFM.SAMPLER.STEPS 1".split()
HEADERS = ("part", "parameters (M)", "multiply-adds (G)", "activations (M)")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1088), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args(arguments)
    if min(args.size) < 1:
        parser.error(f"--size is {args.size[0]} {args.size[1]}; both must be at least 1")
    return exit_status(run, args)


def run(args: argparse.Namespace) -> None:
    from dfm_d2.detection.task import DETECTION
    from dfm_d2.engine.setup import load_config, validate_config

    configs = []
    for changes in (["MODEL.META_ARCHITECTURE", "FlowDetector"], TWIN):
        configs.append(
            load_config(DETECTION, args.config_file, ["MODEL.DEVICE", "cpu", *args.opts, *changes])
        )
        configs[-1].MODEL.DFM.NUM_CLASSES = configs[-1].MODEL.DFM.NUM_CLASSES or 20
        validate_config(DETECTION, configs[-1])
    # Now that the config is right, what brings torch.
    import torch
    from tabulate import tabulate

    from dfm_d2.detection.analysis import analyze

    height, width = args.size
    for cfg in configs:
        model = DETECTION.build_model(cfg).eval()
        settings = model.sampler.settings
        print(f"\n{cfg.MODEL.META_ARCHITECTURE}, {len(settings.grid) - 1} steps, ", end="")
        print(f"N = {settings.num_proposals}, one image of {height} x {width}")
        costs = analyze(model, torch.full((3, height, width), 127.0))
        rows = [(cost.part, *(f"{number:.2f}" for number in cost.millions())) for cost in costs]
        align = ("left", "right", "right", "right")
        print(tabulate(rows, headers=HEADERS, colalign=align, disable_numparse=True))


if __name__ == "__main__":
    sys.exit(main())
