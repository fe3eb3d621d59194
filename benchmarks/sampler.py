#!/usr/bin/env python
"""Time of the sampler alone (K steps of the heads on given features): plain torch, kernels, one CUDA graph.

python benchmarks/sampler.py [--device cpu|cuda] [--config configs/voc_flow_r50.yaml] [--save]
    --steps 4 --proposals 300 --predictors 6 --batch 1 --size 800 1216    the sizes; weights are random
    --interactions dynamic_conv cross_attention grid_linear    compare heads; none: the config's
    --precision high|highest    of float32 products; the dynamic convolution's kernel needs "high" (TF32)
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from dfm_kernels import kernels  # noqa: E402
from rows import Row, commit, device_name, save_rows  # noqa: E402
from timing import launches, measure, peak_mib  # noqa: E402

import dfm_d2.registry  # noqa: E402, F401  (registers the meta-architectures)
from dfm_d2.config import add_dfm_config  # noqa: E402
from dfm_d2.framework import build_model, get_cfg  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--config", default=str(ROOT / "configs" / "voc_flow_r50.yaml"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--proposals", type=int, default=300)
    parser.add_argument("--predictors", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--interactions", nargs="+", default=[""])
    parser.add_argument("--precision", choices=("highest", "high"), default="high")
    parser.add_argument("--name", help="of the rows; none: sampler_<device>")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.csv")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: use --device cpu")
    torch.set_float32_matmul_precision(args.precision)
    rows = [row for interaction in args.interactions for row in rows_of(args, interaction)]
    for row in rows:
        print(f"{row.provider:24s} {row.mode:12s} {row.metric} {row.p50:.4g} {row.unit}")
    if args.save:
        print(save_rows(args.name or f"sampler_{args.device}", rows))


def detector(args: argparse.Namespace, time: str, interaction: str) -> torch.nn.Module:
    """Of the config, with random weights."""
    cfg = get_cfg()
    add_dfm_config(cfg)
    cfg.merge_from_file(args.config)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = args.device, ""
    cfg.MODEL.DFM.NUM_CLASSES = cfg.MODEL.DFM.NUM_CLASSES or 20
    cfg.MODEL.DFM.NUM_PREDICTORS, cfg.MODEL.DFM.TIME = args.predictors, time
    if interaction:
        cfg.MODEL.DFM.HEAD.INTERACTION = interaction
    cfg.MODEL.DFM.SAMPLER.STEPS, cfg.MODEL.DFM.SAMPLER.NUM_PROPOSALS = args.steps, args.proposals
    torch.manual_seed(0)
    return build_model(cfg).eval()


def rows_of(args: argparse.Namespace, interaction: str) -> list[Row]:
    """Rows for partitioned (K head evaluations) and shared time (D K of them)."""
    rows = []
    for time in ("partitioned", "shared"):
        model = detector(args, time, interaction)
        shapes = model.backbone.output_shape()
        features = [
            torch.randn(
                args.batch,
                shapes[name].channels,
                -(-args.size[0] // shapes[name].stride),
                -(-args.size[1] // shapes[name].stride),
                device=args.device,
            ).contiguous(memory_format=torch.channels_last)
            for name in model.in_features
        ]
        sizes = torch.tensor([args.size] * args.batch, dtype=torch.float32, device=args.device)
        providers = [("torch", "torch", 0), ("auto", "auto", 0)]
        if args.device == "cuda":
            providers.append(("auto, CUDA graph", "auto", 1))
        expected = None
        for name, backend, graphs in providers:
            model.sampler.graphs.size = graphs
            run = partial(sample, model, features, sizes)
            with torch.no_grad(), kernels(backend):
                found = [run() for _ in range(3)][-1]  # the third of a shape is the second capture's replay
                expected = expected or found
                # Bits of TF32 grow over the steps; what is compared is that it is the same function.
                error = float((found.x_1_hat - expected.x_1_hat).abs().median())
                assert error < 0.05, f"{name}: median endpoint differs by {error}"
                assert len(model.sampler.graphs) == graphs, "the sampler was not captured"
                times = measure(run, args.device)
                values = {("time", "ms"): times}
                if args.device == "cuda":
                    values["launches", ""] = (float(launches(run)),) * 3
                    values["peak memory", "MiB"] = (peak_mib(run),) * 3
            label = (
                f"B={args.batch} N={args.proposals} D={args.predictors} K={args.steps} "
                f"{args.size[0]}x{args.size[1]}"
            )
            for (metric, unit), three in values.items():
                rows.append(
                    Row("sampler", f"{interaction} {name}".strip(), time, metric, unit, "size", label, *three,
                        device_name(args.device), torch.__version__, commit(), f"float32 {args.precision}")
                )  # fmt: skip
    return rows


def sample(model: torch.nn.Module, features: list[torch.Tensor], sizes: torch.Tensor):
    """Candidates of the sampler, noise included."""
    ids = list(range(len(sizes)))
    return model.sampler.sample(model._flow, features, sizes, ids, model._graph_owner())


if __name__ == "__main__":
    main()
