#!/usr/bin/env python
"""Write the generated set of the demo, in VOC layout."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.errors import exit_status  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__)
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
