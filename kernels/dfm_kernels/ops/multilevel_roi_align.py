"""The ops `dfm::multilevel_roi_align` and `dfm::multilevel_roi_align_backward`.

Shapes: B images, N proposals, L levels, C channels, P grid cells a side, S samples a cell and side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfm_kernels import reference
from dfm_kernels.dispatch import use_triton

_MAX_LEVELS = 5


def _unsupported(features: Sequence[Tensor], boxes_xyxy: Tensor, scales: Sequence[float]) -> str:
    """Why the kernel cannot take these tensors; empty: it can."""
    if boxes_xyxy.dtype != torch.float32:
        return f"boxes are {boxes_xyxy.dtype}, the kernel computes in float32"
    if len({f.dtype for f in features}) > 1 or features[0].dtype == torch.float64:
        return f"features are {[str(f.dtype) for f in features]}, the kernel takes one dtype, not float64"
    if len(features) > _MAX_LEVELS:
        return f"there are {len(features)} feature levels, the kernel takes at most {_MAX_LEVELS}"
    if any(fine != 2 * coarse for fine, coarse in zip(scales, scales[1:])):
        return f"scales {tuple(scales)} do not halve from level to level"
    return ""


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    canonical_size: float = 224.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Pool every proposal from the one level that fits its size. No gradient reaches the boxes.

    Predictors that look at boxes of their own are pooled in the same launch as more proposals: `(B, D N, 4)`.

    Args:
        features: L tensors `(B, C, H_l, W_l)`, from fine to coarse; memory format channels_last saves a copy.
        boxes_xyxy: `(B, N, 4)` pixels.
        scales: L numbers, 1 / stride, each half of the one before.
        output_size: P. sampling_ratio: S; 0 is adaptive, `ceil(side / P)` a box.
        backend: one of dfm_kernels.dispatch.BACKENDS.

    Returns:
        `(B * N, C, P, P)`, image by image (a view of `(B * N, P, P, C)`).

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
    options = (list(scales), output_size, sampling_ratio, canonical_size)
    unsupported = _unsupported(features, boxes_xyxy, scales)
    if not use_triton("multilevel_roi_align", backend, boxes_xyxy, unsupported):
        return reference.multilevel_roi_align(features, boxes_xyxy, *options)
    return _multilevel_roi_align(list(features), boxes_xyxy.detach(), *options).permute(0, 3, 1, 2)


@torch.library.custom_op("dfm::multilevel_roi_align", mutates_args=())
def _multilevel_roi_align(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    # Only here: where there is no Triton, the reference must do without this import.
    from dfm_kernels.triton.multilevel_roi_align import multilevel_roi_align as launch

    return launch(features, boxes_xyxy, scales, output_size, sampling_ratio, canonical_size)


@_multilevel_roi_align.register_fake
def _(features, boxes_xyxy, scales, output_size, sampling_ratio, canonical_size):
    count, channels = boxes_xyxy.shape[0] * boxes_xyxy.shape[1], features[0].shape[1]
    return features[0].new_empty(count, output_size, output_size, channels)


@torch.library.custom_op("dfm::multilevel_roi_align_backward", mutates_args=())
def _backward(
    d_pooled: Tensor,
    boxes_xyxy: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    canonical_size: float,
) -> list[Tensor]:
    from dfm_kernels.triton.multilevel_roi_align import multilevel_roi_align_backward as launch

    return launch(d_pooled, boxes_xyxy, sizes, scales, sampling_ratio, canonical_size)


@_backward.register_fake
def _(d_pooled, boxes_xyxy, sizes, scales, sampling_ratio, canonical_size):
    shape = (boxes_xyxy.shape[0], d_pooled.shape[-1])
    return [
        d_pooled.new_empty(*shape, height, width, dtype=torch.float32).contiguous(
            memory_format=torch.channels_last
        )
        for height, width in zip(sizes[::2], sizes[1::2])
    ]


def _setup_context(ctx, inputs, output):
    features, boxes_xyxy, scales, _, sampling_ratio, canonical_size = inputs
    ctx.save_for_backward(boxes_xyxy)
    ctx.dtype = features[0].dtype
    ctx.options = ([side for f in features for side in f.shape[2:]], scales, sampling_ratio, canonical_size)


def _gradients(ctx, d_pooled):
    found = _backward(d_pooled, *ctx.saved_tensors, *ctx.options)
    return [gradient.to(ctx.dtype) for gradient in found], *[None] * 5


_multilevel_roi_align.register_autograd(_gradients, setup_context=_setup_context)
