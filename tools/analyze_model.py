#!/usr/bin/env python
"""Parameters, multiply-adds and activations of a config's detector, part by part, beside its cascade twin.

python tools/analyze_model.py --config-file configs/voc_flow_r50.yaml --size 800 1088 [KEY VALUE ...]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.command_line import exit_status, parser_of  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1088), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args(arguments)
    if min(args.size) < 1:
        parser.error(f"--size is {args.size[0]} {args.size[1]}; both must be at least 1")
    return exit_status(run, args)


def run(args: argparse.Namespace) -> None:
    import torch
    from tabulate import tabulate

    import dfm_d2.registry  # noqa: F401  (registers the meta-architectures)
    from dfm_d2.detection.analysis import analyze
    from dfm_d2.detection.task import DETECTION
    from dfm_d2.engine.setup import load_config, validate_config
    from dfm_d2.errors import input_errors
    from dfm_d2.framework import build_model

    height, width = args.size
    twins = {
        "FlowDetector": [],
        "CascadeDetector": ["MODEL.DFM.UPDATE", "joint", "MODEL.DFM.SAMPLER.STEPS", "1"],
    }
    for architecture, changes in twins.items():
        opts = ["MODEL.DEVICE", "cpu", *args.opts, "MODEL.META_ARCHITECTURE", architecture, *changes]
        cfg = load_config(DETECTION, args.config_file, [*opts, "MODEL.DFM.KERNELS", "torch"])
        cfg.MODEL.DFM.NUM_CLASSES = cfg.MODEL.DFM.NUM_CLASSES or 20
        with input_errors():
            validate_config(DETECTION, cfg)
            model = build_model(cfg).eval()
        settings = model.sampler.settings
        rows = [
            (cost.part, *(f"{number:.2f}" for number in cost.millions()))
            for cost in analyze(model, torch.full((3, height, width), 127.0))
        ]
        headers = ["part", "parameters (M)", "multiply-adds (G)", "activations (M)"]
        align = ("left", "right", "right", "right")
        print(f"\n{architecture}, {len(settings.grid) - 1} steps, N = {settings.num_proposals}", end="")
        print(f", one image of {height} x {width}")
        print(tabulate(rows, headers=headers, colalign=align, disable_numparse=True))


if __name__ == "__main__":
    sys.exit(main())
