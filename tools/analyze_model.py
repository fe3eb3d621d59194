#!/usr/bin/env python
"""Parameters, multiply-adds and activations of a config's detector, part by part, beside its cascade twin.

python tools/analyze_model.py --config-file configs/voc_flow_r50.yaml --size 800 1088 [KEY VALUE ...]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.errors import UserError, report  # noqa: E402

# Detector: what it needs besides its name.
TWINS = {
    "FlowDetector": [],
    "CascadeDetector": ["MODEL.DFM.UPDATE", "joint", "MODEL.DFM.SAMPLER.STEPS", "1"],
}


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
    try:
        for architecture in TWINS:
            print_costs(architecture, args)
    except UserError as error:
        return report(error)
    return 0


def print_costs(architecture: str, args: argparse.Namespace) -> None:
    """The table of one detector."""
    from dfm_d2.detection.task import DETECTION
    from dfm_d2.engine.setup import load_config, validate_config

    opts = ["MODEL.DEVICE", "cpu", *args.opts, "MODEL.DFM.KERNELS", "torch"]
    opts += ["MODEL.META_ARCHITECTURE", architecture, *TWINS[architecture]]
    cfg = load_config(DETECTION, args.config_file, opts)
    cfg.MODEL.DFM.NUM_CLASSES = cfg.MODEL.DFM.NUM_CLASSES or 20
    validate_config(DETECTION, cfg)
    # Now that the config is right, what brings torch.
    import torch
    from tabulate import tabulate

    from dfm_d2.detection.analysis import analyze

    height, width = args.size
    model = DETECTION.build_model(cfg).eval()
    costs = analyze(model, torch.full((3, height, width), 127.0))
    rows = [(cost.part, *(f"{number:.2f}" for number in cost.millions())) for cost in costs]
    headers = ["part", "parameters (M)", "multiply-adds (G)", "activations (M)"]
    align = ("left", "right", "right", "right")
    settings = model.sampler.settings
    title = f"{architecture}, {len(settings.grid) - 1} steps, N = {settings.num_proposals}"
    print(f"\n{title}, one image of {height} x {width}")
    print(tabulate(rows, headers=headers, colalign=align, disable_numparse=True))


if __name__ == "__main__":
    sys.exit(main())
