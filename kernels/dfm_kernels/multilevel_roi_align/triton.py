"""Triton kernels of RoIAlign over a feature pyramid: all levels, images and proposals in one launch.

The specification is the reference. A program pools one proposal, a tile of grid
cells and channels at a time; the backward adds to the pyramid's gradient with atomics, in float32, so
that its last bits depend on the order of execution.
Shapes: B images, N proposals, M = B N, L levels, C channels, P grid cells a side, S samples.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _position(low, bin_size, divisor, cell, k, size):
    """First pixel, second pixel, share of the second and whether the sample counts, along one axis."""
    position = low + (cell + (k + 0.5) / divisor) * bin_size
    last = size - 1.0
    counts = (position >= -1) & (position <= last + 1)
    position = tl.minimum(tl.maximum(position, 0.0), last)
    first = tl.floor(position)
    share = position - first
    second = tl.minimum(first + 1, last)
    return first.to(tl.int64), second.to(tl.int64), share, counts


@triton.jit
def _roi_align_kernel(
    levels,
    sides,
    box_ptr,
    pooled_ptr,
    counts,
    numbers,
    SAMPLES: tl.constexpr,
    BACKWARD: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_proposals, num_channels, min_level = counts
    scale, canonical_size = numbers
    m = tl.program_id(0).to(tl.int64)
    x0, y0 = tl.load(box_ptr + 4 * m), tl.load(box_ptr + 4 * m + 1)
    x1, y1 = tl.load(box_ptr + 4 * m + 2), tl.load(box_ptr + 4 * m + 3)
    # FPN's rule, arXiv 1612.03144, eq. 1. A box that is not finite has no level: the finest.
    side = tl.sqrt(tl.maximum(x1 - x0, 0.0) * tl.maximum(y1 - y0, 0.0))
    wanted = tl.floor(4 + tl.log2(side / canonical_size + 1e-8)) - min_level
    wanted = tl.where(wanted == wanted, wanted, 0.0)
    level = tl.minimum(tl.maximum(wanted, 0.0), NUM_LEVELS - 1.0).to(tl.int32)

    pixel_ptr, height, width, level_scale = levels[0], sides[0], sides[1], scale
    for index in tl.static_range(1, NUM_LEVELS):
        if level == index:
            pixel_ptr, height, width = levels[index], sides[2 * index], sides[2 * index + 1]
            level_scale = scale / 2**index

    left, top = x0 * level_scale - 0.5, y0 * level_scale - 0.5
    bin_w, bin_h = (x1 * level_scale - 0.5 - left) / P, (y1 * level_scale - 0.5 - top) / P
    if SAMPLES > 0:
        samples_x, samples_y = SAMPLES, SAMPLES
    else:
        # No box of an image has that many; an infinite one must not make the loop endless.
        samples_x = tl.minimum(tl.maximum(tl.ceil(bin_w), 0.0), 1024.0).to(tl.int32)
        samples_y = tl.minimum(tl.maximum(tl.ceil(bin_h), 0.0), 1024.0).to(tl.int32)
    divisor_x = tl.maximum(samples_x, 1) * 1.0
    divisor_y = tl.maximum(samples_y, 1) * 1.0
    image = pixel_ptr + (m // num_proposals) * height * width * num_channels

    for first_cell in range(0, P * P, BLOCK_CELLS):
        cell = first_cell + tl.arange(0, BLOCK_CELLS)
        cell_y, cell_x = (cell // P).to(tl.float32), (cell % P).to(tl.float32)
        for first_channel in range(0, num_channels, BLOCK_C):
            c = first_channel + tl.arange(0, BLOCK_C)
            tile = (cell < P * P)[:, None] & (c < num_channels)[None, :]
            # int64: B N P^2 C can pass 2^31.
            where = pooled_ptr + (m * P * P + cell[:, None]) * num_channels + c[None, :]
            if BACKWARD:
                value = tl.load(where, mask=tile, other=0.0).to(tl.float32) / (divisor_x * divisor_y)
            else:
                value = tl.zeros([BLOCK_CELLS, BLOCK_C], tl.float32)
            for sample in range(0, samples_x * samples_y):
                j, i = sample // samples_x, sample % samples_x
                row0, row1, share_y, counts_y = _position(top, bin_h, divisor_y, cell_y, j, height)
                col0, col1, share_x, counts_x = _position(left, bin_w, divisor_x, cell_x, i, width)
                used = tile & (counts_y & counts_x)[:, None]
                p00 = image + (row0 * width + col0)[:, None] * num_channels + c[None, :]
                p01 = image + (row0 * width + col1)[:, None] * num_channels + c[None, :]
                p10 = image + (row1 * width + col0)[:, None] * num_channels + c[None, :]
                p11 = image + (row1 * width + col1)[:, None] * num_channels + c[None, :]
                w00, w01 = ((1 - share_y) * (1 - share_x))[:, None], ((1 - share_y) * share_x)[:, None]
                w10, w11 = (share_y * (1 - share_x))[:, None], (share_y * share_x)[:, None]
                if BACKWARD:
                    tl.atomic_add(p00, w00 * value, mask=used, sem="relaxed")
                    tl.atomic_add(p01, w01 * value, mask=used, sem="relaxed")
                    tl.atomic_add(p10, w10 * value, mask=used, sem="relaxed")
                    tl.atomic_add(p11, w11 * value, mask=used, sem="relaxed")
                else:
                    value += w00 * tl.load(p00, mask=used, other=0.0).to(tl.float32)
                    value += w01 * tl.load(p01, mask=used, other=0.0).to(tl.float32)
                    value += w10 * tl.load(p10, mask=used, other=0.0).to(tl.float32)
                    value += w11 * tl.load(p11, mask=used, other=0.0).to(tl.float32)
            if not BACKWARD:
                value = value / (divisor_x * divisor_y)
                tl.store(where, value.to(pooled_ptr.dtype.element_ty), mask=tile)


def _launch(levels, boxes_xyxy, pooled, sampling_ratio, numbers, backward):
    """pooled: `(M, P, P, C)`, written, or read in the backward; levels the other way round."""
    if pooled.numel() == 0 or levels[0].numel() == 0:
        return
    num_channels = pooled.shape[3]
    _roi_align_kernel[(len(pooled),)](
        tuple(levels),
        tuple(side for level in levels for side in level.shape[2:]),
        boxes_xyxy.contiguous(),
        pooled,
        (boxes_xyxy.shape[1], num_channels, round(-math.log2(numbers[0]))),
        tuple(numbers),
        SAMPLES=sampling_ratio,
        BACKWARD=backward,
        NUM_LEVELS=len(levels),
        P=pooled.shape[1],
        BLOCK_CELLS=4,
        BLOCK_C=min(triton.next_power_of_2(num_channels), 64),
    )


def _empty_pooled(features: list[Tensor], boxes_xyxy: Tensor, output_size: int) -> Tensor:
    count = boxes_xyxy.shape[0] * boxes_xyxy.shape[1]
    return features[0].new_empty(count, output_size, output_size, features[0].shape[1])


@torch.library.custom_op("dfm::multilevel_roi_align", mutates_args=())
def multilevel_roi_align(
    features: list[Tensor], boxes_xyxy: Tensor, output_size: int, sampling_ratio: int, numbers: list[float]
) -> Tensor:
    """`(M, P, P, C)` in the features' dtype; boxes float32; numbers: the finest scale, the canonical size."""
    # Pixels of one channel after another would make every load of a warp its own transaction.
    levels = [f.contiguous(memory_format=torch.channels_last) for f in features]
    pooled = _empty_pooled(features, boxes_xyxy, output_size)
    _launch(levels, boxes_xyxy, pooled, sampling_ratio, numbers, False)
    return pooled


@multilevel_roi_align.register_fake
def _(features, boxes_xyxy, output_size, *options):
    return _empty_pooled(features, boxes_xyxy, output_size)


def _zero_levels(d_pooled: Tensor, boxes_xyxy: Tensor, sides: list[int]) -> list[Tensor]:
    """Gradients by the features, laid out as channels_last."""
    num_images, num_channels = boxes_xyxy.shape[0], d_pooled.shape[-1]
    return [
        d_pooled.new_zeros(num_images, *size, num_channels, dtype=torch.float32).permute(0, 3, 1, 2)
        for size in zip(sides[::2], sides[1::2])
    ]


@torch.library.custom_op("dfm::multilevel_roi_align_backward", mutates_args=())
def _backward(
    d_pooled: Tensor, boxes_xyxy: Tensor, sides: list[int], sampling_ratio: int, numbers: list[float]
) -> list[Tensor]:
    """Gradients by the features, float32.

    Args:
        d_pooled: `(M, P, P, C)`. sides: `H_0, W_0, H_1, W_1, ...` of the levels.
    """
    levels = _zero_levels(d_pooled, boxes_xyxy, sides)
    _launch(levels, boxes_xyxy, d_pooled.contiguous(), sampling_ratio, numbers, True)
    return levels


_backward.register_fake(
    lambda d_pooled, boxes_xyxy, sides, *options: _zero_levels(d_pooled, boxes_xyxy, sides)
)


def _setup_context(ctx, inputs, output):
    features, boxes_xyxy, _, *options = inputs
    ctx.save_for_backward(boxes_xyxy)
    ctx.dtype = features[0].dtype
    ctx.options = ([side for f in features for side in f.shape[2:]], *options)


def _gradients(ctx, d_pooled):
    found = _backward(d_pooled, *ctx.saved_tensors, *ctx.options)
    return [gradient.to(ctx.dtype) for gradient in found], *[None] * 4


multilevel_roi_align.register_autograd(_gradients, setup_context=_setup_context)
