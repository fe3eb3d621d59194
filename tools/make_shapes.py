#!/usr/bin/env python
"""Write the generated set of the demo, in VOC layout."""

import argparse
import sys
from pathlib import Path

from command_line import argument_parser

from dfm_d2.errors import exit_status


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    parser = argument_parser(__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder to write, for example data/shapes")
    parser.add_argument("--train", type=int, default=1500, help="number of training images")
    parser.add_argument("--val", type=int, default=300, help="number of validation images")
    parser.add_argument("--size", type=int, default=128, help="side of the square images in pixels")
    parser.add_argument("--seed", type=int, default=0)
    return exit_status(run, parser.parse_args(arguments))


def run(args: argparse.Namespace) -> None:
    from dfm_d2.detection.data.shapes import write_shapes

    wrote = write_shapes(args.out, args.train, args.val, args.size, args.seed)
    done = "wrote" if wrote else "already complete, nothing to do:"
    print(f"{done} {args.out} ({args.train} train, {args.val} val, {args.size} px, seed {args.seed})")


if __name__ == "__main__":
    sys.exit(main())
