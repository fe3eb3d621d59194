"""Triton kernel of the path sample: noise, D points of the path and their pixel boxes in one launch.

The specification is dfm_kernels.reference.sample_box_paths.
Shapes: B images, N proposals, M = B N queries, D predictors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_kernels.reference.box_flow_update import MIN_SIDE
from dfm_kernels.reference.path_sample import BoxPathSample
from dfm_kernels.reference.philox import _SMALLEST
from dfm_kernels.triton.box_flow_update import _clamp, _side

_BLOCK_M = 256
_BELOW_ONE = 1.0 - 2.0**-24


@triton.jit
def _uniform(word, below_one):
    """A 32-bit word to float32 in [0, 1), as reference.philox does it."""
    signed = word.to(tl.int32, bitcast=True)
    folded = tl.where(signed < 0, -signed - 1, signed)
    return tl.minimum(folded.to(tl.float32) * 4.6566127342e-10, below_one)


@triton.jit
def _normals(word_0, word_1, smallest, below_one):
    """Box-Muller: two words to two standard normals."""
    u_1 = tl.maximum(_uniform(word_0, below_one), smallest)
    angle = 6.283185307179586 * _uniform(word_1, below_one)
    radius = tl.sqrt(-2.0 * tl.log(u_1))
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _path_sample_fwd_kernel(
    seed_ptr,
    offset_ptr,
    x_1_ptr,
    t_ptr,
    size_ptr,
    x_0_ptr,
    x_t_ptr,
    dx_t_ptr,
    box_ptr,
    num_queries,
    num_proposals,
    num_images,
    num_predictors,
    s,
    min_side,
    smallest,
    below_one,
    BLOCK_M: tl.constexpr,
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = m < num_queries
    image = m // num_proposals
    index = (m % num_proposals).to(tl.uint32)
    seed = tl.load(seed_ptr + image, mask=inside, other=0)
    offset = tl.load(offset_ptr)
    low = tl.zeros([BLOCK_M], tl.uint32) + offset.to(tl.uint32)
    high = tl.zeros([BLOCK_M], tl.uint32) + (offset >> 32).to(tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(seed, index, tl.zeros([BLOCK_M], tl.uint32), low, high)
    a_cx, a_cy = _normals(word_0, word_1, smallest, below_one)
    a_w, a_h = _normals(word_2, word_3, smallest, below_one)
    at = m * 4
    b_cx = tl.load(x_1_ptr + at, mask=inside, other=0.0)
    b_cy = tl.load(x_1_ptr + at + 1, mask=inside, other=0.0)
    b_w = tl.load(x_1_ptr + at + 2, mask=inside, other=0.0)
    b_h = tl.load(x_1_ptr + at + 3, mask=inside, other=0.0)
    tl.store(x_0_ptr + at, a_cx, mask=inside)
    tl.store(x_0_ptr + at + 1, a_cy, mask=inside)
    tl.store(x_0_ptr + at + 2, a_w, mask=inside)
    tl.store(x_0_ptr + at + 3, a_h, mask=inside)
    tl.store(dx_t_ptr + at, b_cx - a_cx, mask=inside)
    tl.store(dx_t_ptr + at + 1, b_cy - a_cy, mask=inside)
    tl.store(dx_t_ptr + at + 2, b_w - a_w, mask=inside)
    tl.store(dx_t_ptr + at + 3, b_h - a_h, mask=inside)
    height = tl.load(size_ptr + image * 2, mask=inside, other=1.0).to(tl.float32)
    width = tl.load(size_ptr + image * 2 + 1, mask=inside, other=1.0).to(tl.float32)
    row, time = at, image
    for _ in range(num_predictors):
        t = tl.load(t_ptr + time, mask=inside, other=0.0).to(tl.float32)
        cx, cy = (1 - t) * a_cx + t * b_cx, (1 - t) * a_cy + t * b_cy
        w, h = (1 - t) * a_w + t * b_w, (1 - t) * a_h + t * b_h
        tl.store(x_t_ptr + row, cx, mask=inside)
        tl.store(x_t_ptr + row + 1, cy, mask=inside)
        tl.store(x_t_ptr + row + 2, w, mask=inside)
        tl.store(x_t_ptr + row + 3, h, mask=inside)
        cx, cy = _side(cx, s, 0.0), _side(cy, s, 0.0)
        w, h = _side(w, s, min_side), _side(h, s, min_side)
        tl.store(box_ptr + row, _clamp(cx - w / 2, 0.0, 1.0) * width, mask=inside)
        tl.store(box_ptr + row + 1, _clamp(cy - h / 2, 0.0, 1.0) * height, mask=inside)
        tl.store(box_ptr + row + 2, _clamp(cx + w / 2, 0.0, 1.0) * width, mask=inside)
        tl.store(box_ptr + row + 3, _clamp(cy + h / 2, 0.0, 1.0) * height, mask=inside)
        row += num_queries * 4
        time += num_images


def sample_box_paths(
    seed: Tensor, offset: Tensor, x_1: Tensor, t: Tensor, image_sizes: Tensor, signal_scale: float
) -> BoxPathSample:
    """One launch; the arguments of the reference, `x_1` float32, `offset` an int64 tensor `()`."""
    num_images, num_proposals = x_1.shape[:2]
    num_predictors = t.shape[0]
    x_1 = x_1.contiguous()
    x_0, dx_t = torch.empty_like(x_1), torch.empty_like(x_1)
    x_t, boxes_xyxy = (x_1.new_empty(num_predictors, *x_1.shape) for _ in range(2))
    num_queries = num_images * num_proposals
    if num_queries > 0:
        _path_sample_fwd_kernel[(triton.cdiv(num_queries, _BLOCK_M),)](
            seed.contiguous(),
            offset,
            x_1,
            t.contiguous(),
            image_sizes.contiguous(),
            x_0,
            x_t,
            dx_t,
            boxes_xyxy,
            num_queries,
            num_proposals,
            num_images,
            num_predictors,
            signal_scale,
            MIN_SIDE,
            _SMALLEST,
            _BELOW_ONE,
            BLOCK_M=_BLOCK_M,
        )
    return BoxPathSample(x_0=x_0, x_t=x_t, dx_t=dx_t, boxes_xyxy=boxes_xyxy)
