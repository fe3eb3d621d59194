#!/usr/bin/env python
r"""Detect in images, folders and videos, and write what was found.

python tools/detect.py --config-file output/demo/config.yaml --weights output/demo/model_final.pth \
    --input a.jpg folder/ film.mp4 --output found
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

from dfm_d2.command_line import exit_status, parser_of  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", required=True, help="checkpoint of the detector")
    parser.add_argument(
        "--input", dest="inputs", nargs="+", required=True, help="images, folders of images, videos"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--confidence-threshold", dest="score_thresh", type=float, default=0.3, help="least score drawn"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images or frames computed at once")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides")
    return exit_status(run, parser.parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    """1 where some inputs could not be read, else 0."""
    from dfm_d2.detection.detect_files import detect_files

    failures = detect_files(**vars(args))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
