#!/usr/bin/env python
r"""Write a trained detector as one file: TorchScript, ONNX, torch.export's pt2, or that compiled (aoti).

python tools/export_model.py --config-file output/demo/config.yaml --format onnx --output exported \
    MODEL.WEIGHTS output/demo/model_final.pth
python tools/export_model.py ... --noise constant             the noise is inside of the file
python tools/export_model.py ... --format aoti                pt2 compiled; needs a C++ compiler
python tools/export_model.py ... --run-eval                   AP of the file beside that of the model
python tools/export_model.py ... MODEL.DFM.SAMPLER.STEPS 1    other steps than those of the config
"""

import argparse
import sys
from pathlib import Path

from command_line import argument_parser

from dfm_d2.errors import UserError, exit_status
from dfm_d2.export import FORMATS


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    parser = argument_parser(__doc__, required=True)
    parser.add_argument("--format", choices=sorted(FORMATS), default="torchscript", help="output format")
    parser.add_argument("--export-method", choices=["tracing"], default="tracing")
    parser.add_argument("--sample-image", help="image of which the trace is made; else a blank one")
    parser.add_argument("--run-eval", action="store_true", help="AP of the file on DATASETS.TEST")
    parser.add_argument("--output", default="exported", help="folder to write")
    parser.add_argument("--noise", choices=["input", "constant"], default="input")
    return exit_status(run, parser.parse_args(arguments))


def run(args: argparse.Namespace) -> None:
    """Export, and with ``--run-eval`` print the AP of the model and of its file."""
    import numpy as np

    from dfm_d2.data.images import read_image
    from dfm_d2.detection.task import DETECTION
    from dfm_d2.engine.setup import check_weights, load_config, resolve_classes, validate_config

    cfg = load_config(DETECTION, args.config_file, args.opts)
    validate_config(DETECTION, cfg)
    check_weights(cfg.MODEL.WEIGHTS)
    # Files compute in float32 and in plain torch, and so does the model that they are compared with.
    cfg.SOLVER.AMP.ENABLED = False
    cfg.MODEL.DFM.KERNELS = "torch"
    pixels = np.full((480, 640, 3), 127, dtype=np.uint8)
    if args.sample_image:
        pixels = read_image(args.sample_image, cfg.INPUT.FORMAT)
    # Now that the config is right, what brings torch; torchvision cannot be imported first within a trace.
    import torchvision  # noqa: F401

    from dfm_d2.detection.data.loader import resized_item
    from dfm_d2.detection.exportable import ConstantNoise, ExportedDetector, export_detector, prepared_model
    from dfm_d2.detection.loading import load_detector
    from dfm_d2.engine.run import evaluate

    model, classes = load_detector(cfg, explicit_device="MODEL.DEVICE" in args.opts[0::2])
    image = resized_item({"file_name": args.sample_image, "image_id": 0}, pixels, cfg)["image"].float()
    is_constant = args.noise == "constant"
    path = export_detector(model, args.format, args.output, cfg, classes, image, is_constant)
    print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    if not args.run_eval:
        return
    DETECTION.register(cfg)
    if resolve_classes(cfg) != list(classes):
        raise UserError(f"DATASETS.TEST has other classes than the weights, {', '.join(classes)}.")
    eager = prepared_model(model)
    eager = ConstantNoise(eager) if is_constant else eager
    for name, detector in {"eager": eager, args.format: ExportedDetector(path)}.items():
        cfg.OUTPUT_DIR = str(Path(args.output) / name)
        found = evaluate(DETECTION, cfg, detector)["bbox"]
        print(f"{name:12s} AP {found['AP']:.4f}  AP50 {found['AP50']:.4f}")


if __name__ == "__main__":
    sys.exit(main())
