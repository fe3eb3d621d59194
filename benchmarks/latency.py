#!/usr/bin/env python
"""Latency of the whole detector (pixels to Instances) over steps, beside the cascade twin at equal N.

python benchmarks/latency.py [--device cpu|cuda] [--config configs/bccd_flow_r18.yaml] [--save]
    --steps 1 2 4 8 --proposals 100 300 --batches 1 8 --size 352 480 --repeats 5
    --precision high|highest    of float32 products

Weights are random: the time does not depend on them, but for what NMS has to look at. Ratios are those of the
turns, time of the flow over time of the cascade (one pass of its D heads).
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from rows import Row, commit, device_name, quantiles, save_rows  # noqa: E402
from timing import in_turns  # noqa: E402

import dfm_d2.registry  # noqa: E402, F401  (registers the meta-architectures)
from dfm_d2.config import add_dfm_config  # noqa: E402
from dfm_d2.framework import build_model, get_cfg  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--config", default=str(ROOT / "configs" / "bccd_flow_r18.yaml"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--proposals", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, nargs=2, default=(352, 480), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("highest", "high"), default="highest")
    parser.add_argument("--name", help="of the rows; none: latency_<device>")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.csv")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: use --device cpu")
    torch.set_float32_matmul_precision(args.precision)
    rows = []
    for proposals in args.proposals:
        for batch in args.batches:
            rows += rows_of(args, proposals, batch)
    if args.save:
        print(save_rows(args.name or f"latency_{args.device}", rows))


def detector(args: argparse.Namespace, architecture: str, steps: int, proposals: int) -> torch.nn.Module:
    """Of the config, with random weights."""
    cfg = get_cfg()
    add_dfm_config(cfg)
    cfg.merge_from_file(args.config)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = args.device, ""
    cfg.MODEL.DFM.NUM_CLASSES = cfg.MODEL.DFM.NUM_CLASSES or 3
    cfg.MODEL.DFM.SAMPLER.STEPS, cfg.MODEL.DFM.SAMPLER.NUM_PROPOSALS = steps, proposals
    torch.manual_seed(0)
    return build_model(cfg).eval()


def rows_of(args: argparse.Namespace, proposals: int, batch: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, *args.size), generator=generator, dtype=torch.uint8)
    inputs = [{"image": image, "image_id": i} for i, image in enumerate(images.to(args.device))]
    models = {f"flow K={k}": detector(args, "FlowDetector", k, proposals) for k in args.steps}
    models["cascade"] = detector(args, "CascadeDetector", 1, proposals)
    heads = models["cascade"].num_predictors
    with torch.no_grad():
        runs = {name: (lambda model=model: model(inputs)) for name, model in models.items()}
        times = in_turns(runs, args.device, args.repeats)
    label = f"N={proposals} B={batch} {args.size[0]}x{args.size[1]}"
    rows = []
    for name, values in times.items():
        ratios = [mine / theirs for mine, theirs in zip(values, times["cascade"])]
        for metric, unit, measured in (("latency", "ms", values), ("latency / cascade", "", ratios)):
            rows.append(
                Row(f"detector N={proposals} B={batch}", name, f"D={heads}", metric, unit, "size", label,
                    *quantiles(measured), device_name(args.device), torch.__version__, commit(),
                    f"{Path(args.config).stem}, float32 {args.precision}, in turns")
            )  # fmt: skip
    for row in rows:
        print(f"{row.op:20s} {row.provider:10s} {row.metric} {row.p50:.4g} {row.unit}", flush=True)
    return rows


if __name__ == "__main__":
    main()
