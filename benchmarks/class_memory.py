#!/usr/bin/env python
"""Memory of a training step against depth: a ViT in blocks of one layer, by local flow and by backprop.

python benchmarks/class_memory.py --save
python benchmarks/class_memory.py --device cuda --save

Counted: the bytes that autograd keeps at once for backwards, views once, parameters not. On a GPU also what
its allocator had at most.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from rows import RESULTS, Row, commit, device_name, quantiles, save_rows  # noqa: E402

from dfm_d2.classification.task import CLASSIFICATION  # noqa: E402
from dfm_d2.engine.optimizer import build_block_optimizer  # noqa: E402
from dfm_d2.engine.setup import load_config  # noqa: E402
from dfm_d2.framework import build_model  # noqa: E402
from dfm_d2.local_update.activations import SavedActivations  # noqa: E402
from dfm_d2.local_update.updates import build_update  # noqa: E402

MIB = 2**20
# Method and update of a training.
MODES = {
    "flow, sequential": ("flow", "sequential"),
    "flow, joint": ("flow", "joint"),
    "backprop": ("backprop", "joint"),
}


def measure(args: argparse.Namespace, mode: str, depth: int) -> dict[str, list[float]]:
    """Peak of the saved activations in MiB and milliseconds of a step."""
    method, update = MODES[mode]
    options = f'["img_size=32","patch_size=4","embed_dim={args.dim}","depth={depth}","num_heads=4"]'
    opts = ["UPDATE.METHOD", method, "MODEL.DFM.UPDATE", update, "MODEL.CLASSIFIER.BLOCKS", "0"]
    opts += ["MODEL.CLASSIFIER.TIMM.OPTIONS", options, "MODEL.DFM.NUM_CLASSES", "10"]
    opts += ["MODEL.DEVICE", args.device]
    cfg = load_config(CLASSIFICATION, str(ROOT / "configs" / "cifar10_flow_vit.yaml"), opts)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_block_optimizer(cfg, model)
    strategy = build_update(cfg.MODEL.DFM.UPDATE, "accumulate", False)
    images = torch.randint(0, 256, (args.batch, 3, 32, 32), dtype=torch.uint8)
    batch = [
        {"file_name": f"{i}", "image_id": f"{i}", "label": i % 10, "image": x} for i, x in enumerate(images)
    ]
    on_gpu = args.device == "cuda"

    def step(iteration: int) -> None:
        strategy.step(model, model.prepare(batch, iteration), optimizer, contextlib.nullcontext)
        if on_gpu:
            torch.cuda.synchronize()

    with SavedActivations(exclude=model.parameters()) as saved:
        step(0)
    found = {"saved activations": [saved.peak / MIB], "step": []}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step(1)
        found["allocated"] = [torch.cuda.max_memory_allocated() / MIB]
    for iteration in range(args.repeats):
        begun = time.perf_counter()
        step(iteration + 2)
        found["step"].append(1000 * (time.perf_counter() - begun))
    return found


def draw(found: dict[str, dict[int, float]], title: str, path: Path) -> None:
    """Saved activations against depth, one line a mode."""
    from dfm_d2.visualize.figures import plt, save_figure

    figure, axis = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for mode, points in found.items():
        axis.plot(list(points), list(points.values()), marker="o", label=mode)
    axis.set_xlabel("layers, each a block")
    axis.set_ylabel("saved activations (MiB)")
    axis.set_ylim(bottom=0)
    axis.set_title(title, fontsize=8)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write class_memory_<device>.csv and .png")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: use --device cpu")
    setting = f"ViT, {args.dim} dimensions, 64 tokens, batch {args.batch}"
    hardware, rows = device_name(args.device), []
    peaks: dict[str, dict[int, float]] = {mode: {} for mode in MODES}
    for mode in MODES:
        for depth in args.depths:
            for metric, values in measure(args, mode, depth).items():
                unit = "ms" if metric == "step" else "MiB"
                rows.append(
                    Row("classifier step", mode, args.device, metric, unit, "blocks", str(depth),
                        *quantiles(values), hardware, torch.__version__, commit(), setting)
                )  # fmt: skip
                if metric == "saved activations":
                    peaks[mode][depth] = values[0]
                print(f"{mode:18s} {depth:3d} blocks  {metric} {quantiles(values)[1]:.2f} {unit}", flush=True)
    if args.save:
        save_rows(f"class_memory_{args.device}", rows)
        draw(peaks, f"{setting}, {hardware}", RESULTS / f"class_memory_{args.device}.png")


if __name__ == "__main__":
    main()
