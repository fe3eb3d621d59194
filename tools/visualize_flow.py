#!/usr/bin/env python
r"""Draw what a trained detector finds, how its boxes flow there, and how it was trained.

Writes predictions.png, flow.png, a page that needs no network (NAME.html), and curves.png of the metrics.json
in OUTPUT_DIR where there is one.

python tools/visualize_flow.py --config-file output/demo/config.yaml MODEL.WEIGHTS output/demo/model_final.pth
python tools/visualize_flow.py --config-file output/demo/config.yaml --image a.jpg b.jpg --out pictures \
    MODEL.WEIGHTS output/demo/model_final.pth
"""

import argparse
import sys
from pathlib import Path

from command_line import SCORE, argument_parser

from dfm_d2.config import split_overrides
from dfm_d2.errors import UserError, exit_status


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    parser = argument_parser(__doc__, required=True)
    parser.add_argument("--image", nargs="+", default=[], help="image files; else the first of DATASETS.TEST")
    parser.add_argument("--number", type=int, default=6, help="images of predictions.png")
    parser.add_argument("--score", **SCORE)
    parser.add_argument("--out", default="", help="folder of the pictures; else OUTPUT_DIR")
    words, opts = split_overrides(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(words)
    args.opts += opts
    if args.number < 1:
        parser.error(f"--number is {args.number}; it must be at least 1")
    return exit_status(run, args)


def run(args: argparse.Namespace) -> None:
    from dfm_d2.data.images import image_size
    from dfm_d2.detection.task import DETECTION
    from dfm_d2.engine.setup import check_weights, load_config, setup_run, validate_config

    cfg = load_config(DETECTION, args.config_file, args.opts)
    validate_config(DETECTION, cfg)
    if not args.image and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a data set, or give files with --image.")
    for file in args.image:
        image_size(file)  # an ImageError, where it is not one
    check_weights(cfg.MODEL.WEIGHTS)
    # Now that the config is right, what brings torch.
    from dfm_d2.detection.calibration import chosen_threshold
    from dfm_d2.detection.flow_pictures import write_pictures
    from dfm_d2.detection.loading import load_detector
    from dfm_d2.engine.metrics import METRICS_FILE, read_metrics
    from dfm_d2.engine.run import load_for_inference
    from dfm_d2.visualize.curves import draw_curves

    if args.image:  # no data set is needed
        model, classes = load_detector(cfg, explicit_device="MODEL.DEVICE" in args.opts[0::2])
    else:
        classes = setup_run(DETECTION, cfg, args)
        model = load_for_inference(DETECTION, cfg, classes)
    folder, score = args.out or cfg.OUTPUT_DIR, chosen_threshold(model, args.score)
    print(f"pictures of detections with a score of at least {score:.2f}")
    paths = write_pictures(cfg, model, classes, folder, args.image, args.number, score)
    if metrics := read_metrics(Path(cfg.OUTPUT_DIR) / METRICS_FILE):
        paths.append(draw_curves(Path(folder) / "curves.png", metrics))
    for path in paths:
        print(path)


if __name__ == "__main__":
    sys.exit(main())
