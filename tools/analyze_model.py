#!/usr/bin/env python
"""Parameters, multiply-adds and activations of a config's detector, part by part, beside its cascade twin.

python tools/analyze_model.py --config-file configs/voc_flow_r50.yaml --size 800 1088 [KEY VALUE ...]
"""

import argparse
import sys

from command_line import argument_parser

from dfm_d2.errors import exit_status

TWIN = "MODEL.META_ARCHITECTURE CascadeDetector MODEL.DFM.UPDATE joint MODEL.DFM.SAMPLER.STEPS 1".split()
HEADERS = ("part", "parameters (M)", "multiply-adds (G)", "activations (M)")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    parser = argument_parser(__doc__, required=True)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1088), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args(arguments)
    if min(args.size) < 1:
        parser.error(f"--size is {args.size[0]} {args.size[1]}; both must be at least 1")
    return exit_status(run, args)


def run(args: argparse.Namespace) -> None:
    from dfm_d2.detection.task import DETECTION
    from dfm_d2.engine.setup import load_config, validate_config

    configs = []
    for changes in (["MODEL.META_ARCHITECTURE", "FlowDetector"], TWIN):
        cfg = load_config(DETECTION, args.config_file, ["MODEL.DEVICE", "cpu", *args.opts, *changes])
        cfg.MODEL.DFM.NUM_CLASSES = cfg.MODEL.DFM.NUM_CLASSES or 20
        validate_config(DETECTION, cfg)
        configs.append(cfg)
    # Now that the config is right, what brings torch.
    import torch
    from tabulate import tabulate

    from dfm_d2.detection.analysis import analyze

    height, width = args.size
    image = torch.full((3, height, width), 127.0)
    for cfg in configs:
        model = DETECTION.build_model(cfg).eval()
        settings = model.sampler.settings
        print(f"\n{cfg.MODEL.META_ARCHITECTURE}, {settings.steps} steps, ", end="")
        print(f"N = {settings.num_proposals}, one image of {height} x {width}")
        rows = [
            (part, f"{parameters / 1e6:.2f}", f"{multiply_adds / 1e9:.2f}", f"{activations / 1e6:.2f}")
            for part, parameters, multiply_adds, activations in analyze(model, image)
        ]
        align = ("left", "right", "right", "right")
        print(tabulate(rows, headers=HEADERS, colalign=align, disable_numparse=True))


if __name__ == "__main__":
    sys.exit(main())
