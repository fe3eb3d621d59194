"""The choice between reference and kernel."""

from collections.abc import Sequence
from functools import wraps

import torch
from torch import Tensor

from dfm_kernels.dispatch import use_triton
from dfm_kernels.multilevel_roi_align import reference


def _unsupported(features: Sequence[Tensor], boxes_xyxy: Tensor, scales: Sequence[float]) -> str:
    """Why the kernel cannot take these tensors; empty: it can."""
    if boxes_xyxy.dtype != torch.float32:
        return f"boxes are {boxes_xyxy.dtype}, the kernel computes in float32"
    if len({f.dtype for f in features}) > 1 or features[0].dtype == torch.float64:
        return f"features are {[str(f.dtype) for f in features]}, the kernel takes one dtype, not float64"
    if any(fine != 2 * coarse for fine, coarse in zip(scales, scales[1:])):
        return f"scales {tuple(scales)} do not halve from level to level"
    return ""


# `__wrapped__` alone: help and editors show the reference's signature with the docstring here.
@wraps(reference.multilevel_roi_align, assigned=())
def multilevel_roi_align(
    features, boxes_xyxy, scales, output_size, sampling_ratio, canonical_size=224.0
) -> Tensor:
    """Pool every proposal from the one level that fits its size. No gradient reaches the boxes.

    Predictors that look at boxes of their own are pooled in the same launch as more proposals: `(B, D N, 4)`.
    Shapes: B images, N proposals, L levels, C channels, P grid cells a side, S samples a cell and side.

    Args:
        features: L tensors `(B, C, H_l, W_l)`, from fine to coarse; memory format channels_last saves a copy.
        boxes_xyxy: `(B, N, 4)` pixels.
        scales: L numbers, 1 / stride, each half of the one before.
        output_size: P. sampling_ratio: S; 0 is adaptive, `ceil(side / P)` a box.
        canonical_size: side in pixels of a box that belongs on the level of stride 16.

    Returns:
        `(B * N, C, P, P)`, image by image (a view of `(B * N, P, P, C)`). A box that is not a number pools to
        zero.

    Raises:
        BackendError: "triton" was asked for where it cannot run.
        ValueError: numbers of features and scales differ, or batches do.
    """
    if len(features) != len(scales):
        raise ValueError(f"{len(features)} feature levels but {len(scales)} scales")
    if any(f.shape[0] != boxes_xyxy.shape[0] for f in features):
        raise ValueError(
            f"features of {[f.shape[0] for f in features]} images but boxes of {boxes_xyxy.shape[0]}"
        )
    if not use_triton("multilevel_roi_align", boxes_xyxy, _unsupported(features, boxes_xyxy, scales)):
        options = scales, output_size, sampling_ratio, canonical_size
        return reference.multilevel_roi_align(features, boxes_xyxy, *options)
    from dfm_kernels.multilevel_roi_align.triton import multilevel_roi_align as on_triton

    numbers = [scales[0], canonical_size]
    pooled = on_triton(list(features), boxes_xyxy.detach(), output_size, sampling_ratio, numbers)
    return pooled.permute(0, 3, 1, 2)
