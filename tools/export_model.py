#!/usr/bin/env python
r"""Write a trained detector as one file: TorchScript, ONNX, torch.export's pt2, or that compiled (aoti).

python tools/export_model.py --config-file output/demo/config.yaml --format onnx --output exported \
    MODEL.WEIGHTS output/demo/model_final.pth
python tools/export_model.py ... --steps 1 --noise constant       fewer steps, noise inside of the file
python tools/export_model.py ... --format aoti                    pt2 compiled; needs a C++ compiler
python tools/export_model.py ... --run-eval                       AP of the file beside that of the model
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run from a checkout, from any folder, installed or not

import dfm_d2.registry  # noqa: E402, F401  (registers the meta-architectures)
from dfm_d2.config import split_overrides  # noqa: E402
from dfm_d2.data.images import read_image  # noqa: E402
from dfm_d2.detection.data.loader import resized_item  # noqa: E402
from dfm_d2.detection.data.registration import register_datasets  # noqa: E402
from dfm_d2.detection.loading import load_detector  # noqa: E402
from dfm_d2.detection.task import DETECTION  # noqa: E402
from dfm_d2.detection.tensor_detector import ConstantNoise  # noqa: E402
from dfm_d2.engine.run import evaluate  # noqa: E402
from dfm_d2.engine.setup import load_config, resolve_classes  # noqa: E402
from dfm_d2.errors import UserError, input_errors  # noqa: E402
from dfm_d2.export import FORMATS, ExportSettings, export_model, load_artefact  # noqa: E402
from dfm_d2.export.formats import Preparation, prepared_model  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something that the user can put right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="path to config file")
    parser.add_argument("--format", choices=sorted(FORMATS), default="torchscript", help="output format")
    parser.add_argument("--export-method", choices=["tracing"], default="tracing")
    parser.add_argument("--sample-image", help="image of which the trace is made; else a blank one")
    parser.add_argument("--run-eval", action="store_true", help="AP of the file on DATASETS.TEST")
    parser.add_argument("--output", default="exported", help="folder to write")
    parser.add_argument("--steps", type=int, help="K, Euler steps; else the config's")
    parser.add_argument("--proposals", type=int, help="N, noise boxes; else the config's")
    parser.add_argument(
        "--predictors", type=int, nargs="+", default=[], help="those that answer (TIME shared)"
    )
    parser.add_argument("--noise", choices=["input", "constant"], default="input")
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the config")
    words, opts = split_overrides(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(words)
    args.opts += opts
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> dict:
    """Export, and with ``--run-eval`` the results of the model and of its file: {"eager": ..., FORMAT: ...}.

    Raises UserError, one sentence.
    """
    cfg = load_config(DETECTION, args.config_file, args.opts)
    # Files compute in float32 and in plain torch, and so does the model that they are compared with.
    cfg.SOLVER.AMP.ENABLED = False
    cfg.MODEL.DFM.KERNELS = "torch"
    model, classes = load_detector(cfg, explicit_device="MODEL.DEVICE" in args.opts[0::2])
    with input_errors():
        settings = ExportSettings(args.steps, args.proposals, tuple(args.predictors), args.noise)
        preparation = Preparation.from_config(cfg, model, classes)
        path = export_model(
            model, args.format, args.output, preparation, settings, _sample(cfg, args.sample_image)
        )
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
        if not args.run_eval:
            return {}
        register_datasets(cfg)
        if resolve_classes(cfg) != list(classes):
            raise ValueError(f"DATASETS.TEST has other classes than the weights, {', '.join(classes)}.")
        eager = prepared_model(model, settings)
        if args.noise == "constant":
            eager = ConstantNoise(eager)
        results = {}
        for name, detector in {"eager": eager, args.format: load_artefact(path)}.items():
            cfg.OUTPUT_DIR = str(Path(args.output) / name)
            results[name] = evaluate(DETECTION, cfg, detector)
    for name, found in results.items():
        print(f"{name:12s} " + "  ".join(f"{key} {found['bbox'][key]:.4f}" for key in ("AP", "AP50")))
    return results


def _sample(cfg, image_file: str | None) -> torch.Tensor:
    """`(3, H, W)` float32, of the file or blank, resized as for a test."""
    if image_file:
        pixels = read_image(image_file, cfg.INPUT.FORMAT)
    else:
        pixels = torch.full((480, 640, 3), 127, dtype=torch.uint8).numpy()
    return resized_item({"file_name": image_file or "blank", "image_id": 0}, pixels, cfg)["image"].float()


if __name__ == "__main__":
    sys.exit(main())
