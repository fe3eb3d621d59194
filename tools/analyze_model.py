#!/usr/bin/env python
"""Parameters, multiply-adds and activations of a config's detector, room by room, beside its cascade twin.

python tools/analyze_model.py --config-file configs/voc_flow_r50.yaml --size 800 1088 [KEY VALUE ...]
"""

import argparse
import sys
from pathlib import Path

import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

import dfm_d2.registry  # noqa: E402, F401  (registers the meta-architectures)
from dfm_d2.detection.analysis import RoomCost, analyze  # noqa: E402
from dfm_d2.detection.task import DETECTION  # noqa: E402
from dfm_d2.engine.setup import load_config, validate_config  # noqa: E402
from dfm_d2.errors import UserError, input_errors  # noqa: E402
from dfm_d2.framework import build_model  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1088), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args(arguments)
    if min(args.size) < 1:
        parser.error(f"--size is {args.size[0]} {args.size[1]}; both must be at least 1")
    try:
        for title, costs in rooms_of(args).items():
            print(f"\n{title}, one image of {args.size[0]} x {args.size[1]}\n{table(costs)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def rooms_of(args: argparse.Namespace) -> dict[str, list[RoomCost]]:
    """{title: costs} of the config's detector and of its twin."""
    image = torch.full((3, *args.size), 127.0)
    found = {}
    for architecture in ("FlowDetector", "CascadeDetector"):
        twin = ["MODEL.META_ARCHITECTURE", architecture]
        twin += ["MODEL.DFM.UPDATE", "joint"] if architecture == "CascadeDetector" else []
        twin += ["MODEL.DFM.SAMPLER.STEPS", "1"] if architecture == "CascadeDetector" else []
        cfg = load_config(DETECTION, args.config_file, ["MODEL.DEVICE", "cpu", *args.opts, *twin])
        cfg.MODEL.DFM.NUM_CLASSES = cfg.MODEL.DFM.NUM_CLASSES or 20
        with input_errors():
            validate_config(DETECTION, cfg)
            model = build_model(cfg).eval()
        settings = model.sampler.settings
        title = f"{architecture}, {len(settings.grid) - 1} steps, N = {settings.num_proposals}"
        found[title] = analyze(model, image)
    return found


def table(costs: list[RoomCost]) -> str:
    rows = [
        (
            cost.room,
            f"{cost.parameters / 1e6:.2f}",
            f"{cost.multiply_adds / 1e9:.2f}",
            f"{cost.activations / 1e6:.2f}",
        )
        for cost in costs
    ]
    headers = ["room", "parameters (M)", "multiply-adds (G)", "activations (M)"]
    return tabulate(
        rows, headers=headers, colalign=("left", "right", "right", "right"), disable_numparse=True
    )


if __name__ == "__main__":
    sys.exit(main())
