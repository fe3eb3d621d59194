#!/usr/bin/env python
r"""Detect in images, folders and videos, and write what was found.

python tools/detect.py --config-file output/demo/config.yaml --weights output/demo/model_final.pth \
    --input a.jpg folder/ film.mp4 --output found
"""

import argparse
import sys

from command_line import SCORE, argument_parser

from dfm_d2.errors import exit_status


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some inputs could not be read, 2 something that the user can put right."""
    parser = argument_parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", required=True, help="checkpoint of the detector")
    parser.add_argument("--input", nargs="+", required=True, help="images, folders of images, videos")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--threshold", "--confidence-threshold", **SCORE)
    parser.add_argument("--batch-size", type=int, default=1, help="images or frames computed at once")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE overrides")
    return exit_status(run, parser.parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    from dfm_d2.detection.detect_files import detect_files
    from dfm_d2.detection.task import DETECTION
    from dfm_d2.engine.setup import load_config

    cfg = load_config(DETECTION, args.config_file, [*args.opts, "MODEL.WEIGHTS", args.weights])
    failures = detect_files(cfg, args.input, args.output, args.batch_size, args.threshold)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
