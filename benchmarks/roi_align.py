#!/usr/bin/env python
"""Multi-level RoIAlign: the embedding bag of dfm_kernels beside torchvision's operator, level by level.

python benchmarks/roi_align.py [--device cpu|cuda]
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import roi_align

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "kernels"), str(Path(__file__).resolve().parent)]

from dfm_kernels import kernels  # noqa: E402
from dfm_kernels.multilevel_roi_align import assign_levels, multilevel_roi_align  # noqa: E402
from rows import Row, commit, device_name, quantiles, save_rows  # noqa: E402

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
# Images, proposals, channels, height and width in pixels, grid, samples.
SHAPES = {
    "demo 16x50 128px": (16, 50, 128, 128, 128, 5, 1),
    "16x50 128px S=2": (16, 50, 128, 128, 128, 5, 2),
    "bccd 8x100 352px": (8, 100, 128, 352, 480, 7, 2),
    "voc 2x300 608px": (2, 300, 256, 608, 800, 7, 2),
}


def by_level(features: list[Tensor], boxes_xyxy: Tensor, scales, output_size: int, samples: int) -> Tensor:
    """What a pooler on torchvision's operator does: one call a level, rows put back in order."""
    num_images, num_proposals = boxes_xyxy.shape[:2]
    flat = boxes_xyxy.flatten(0, 1)
    image = torch.arange(num_images, device=flat.device).repeat_interleave(num_proposals)
    rois = torch.cat([image[:, None], flat], dim=1)
    level = assign_levels(flat, len(features), 2, 224.0)
    out = features[0].new_zeros(len(rois), features[0].shape[1], output_size, output_size)
    for index, (feature, scale) in enumerate(zip(features, scales)):
        rows = torch.nonzero(level == index).squeeze(1)
        pooled = roi_align(feature, rois[rows], output_size, scale, samples, aligned=True)
        out = out.index_put((rows,), pooled)
    return out


def milliseconds(run: Callable[[], None], device: str, repeats: int) -> list[float]:
    """Wall-clock of each repetition after one to warm up."""
    times = []
    for repeat in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat:
            times.append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    rows = []
    for name, (images, proposals, channels, height, width, grid, samples) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        features = [
            torch.randn(images, channels, round(height * s), round(width * s), generator=generator).to(
                args.device
            )
            for s in SCALES
        ]
        boxes = torch.rand(images, proposals, 4, generator=generator)
        boxes[..., 2:] = boxes[..., :2] + boxes[..., 2:] * (1 - boxes[..., :2])
        boxes = (boxes * torch.tensor([width, height, width, height])).to(args.device)
        providers = [("torchvision", by_level), ("embedding_bag", multilevel_roi_align)]
        if args.device == "cuda":
            # Its time includes bringing the features to channels_last.
            providers.append(("triton", kernels("triton")(multilevel_roi_align)))
        for provider, op in providers:
            for mode in ("forward", "both"):

                def run(op=op, mode=mode, features=features, boxes=boxes, grid=grid, samples=samples) -> None:
                    leaves = [f.detach().requires_grad_(mode == "both") for f in features]
                    out = op(leaves, boxes, SCALES, grid, samples)
                    if mode == "both":
                        out.sum().backward()

                p20, p50, p80 = quantiles(milliseconds(run, args.device, args.repeats))
                rows.append(
                    Row(
                        "multilevel_roi_align", provider, mode, "time", "ms", "shape", name, p20, p50, p80,
                        device_name(args.device), torch.__version__, commit(),
                    )
                )  # fmt: skip
    print(save_rows(f"roi_align_{args.device}", rows))


if __name__ == "__main__":
    main()
