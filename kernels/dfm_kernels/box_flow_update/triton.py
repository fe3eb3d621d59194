"""Triton kernel of the box-flow update: one launch between the heads of a step and the RoIAlign of the next.

The specification is the reference; the letters are the same. A tile `(M, 2)` holds the centres or the sizes
of boxes, along x and along y.
Shapes: B images, N proposals, M = B N queries, D predictors, K classes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_kernels.box_flow_update.reference import _TIME_EPS, MAX_LOG_SCALE, MIN_SIDE

# Elements of a tile of (queries, classes): 8 registers a thread with 4 warps.
_TILE = 1024


@triton.jit
def load_boxes(ptr, m, axis, inside):
    """Centres and sizes `(M, 2)` of the rows m of a table of (cx, cy, w, h)."""
    where = ptr + m[:, None] * 4 + axis[None, :]
    centre = tl.load(where, mask=inside[:, None], other=0.0)
    size = tl.load(where + 2, mask=inside[:, None], other=0.0)
    return centre.to(tl.float32), size.to(tl.float32)


@triton.jit
def store_boxes(ptr, centre, size, m, axis, inside):
    where = ptr + m[:, None] * 4 + axis[None, :]
    tl.store(where, centre, mask=inside[:, None])
    tl.store(where + 2, size, mask=inside[:, None])


@triton.jit
def _clamp(x, low, high):
    """torch.clamp: a NaN stays one."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _share(x, s, least):
    """A coordinate of the proposal as a share of the image, at least `least`."""
    return _clamp((x / s + 1) / 2, least, 1.0)


@triton.jit
def _step(x, x_1, t, t_next, remaining, eps):
    """Euler: `x + (t_next - t) / (1 - t) (x_1 - x)`, exactly `x_1` at t_next = 1."""
    share = _clamp((t_next - t) / tl.maximum(remaining, eps), 0.0, 1.0)
    return tl.where(t_next >= 1, x_1, x + share * (x_1 - x))


@triton.jit
def _box_flow_update_fwd_kernel(
    inputs, outputs, counts, numbers, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    x_ptr, answer_ptr, logit_ptr, t_ptr, t_next_ptr, size_ptr = inputs
    x_next_ptr, x_1_ptr, box_ptr, prob_ptr = outputs
    num_queries, num_proposals, num_predictors, num_classes, t_stride, t_next_stride = counts
    s, w_x, w_y, w_w, w_h, min_side, max_log, eps = numbers
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    k, axis = tl.arange(0, BLOCK_K), tl.arange(0, 2)
    inside = m < num_queries
    tile = inside[:, None] & (k < num_classes)[None, :]
    image = m // num_proposals
    t = tl.load(t_ptr + image * t_stride, mask=inside, other=0.0).to(tl.float32)[:, None]
    t_next = tl.load(t_next_ptr + image * t_next_stride, mask=inside, other=0.0).to(tl.float32)[:, None]
    remaining = 1 - t
    x_centre, x_size = load_boxes(x_ptr, m, axis, inside)
    centre, size = _share(x_centre, s, 0.0), _share(x_size, s, min_side)
    weight_centre = tl.where(axis == 0, w_x, w_y)[None, :]
    weight_size = tl.where(axis == 0, w_w, w_h)[None, :]

    sum_centre, sum_size = tl.zeros([BLOCK_M, 2], tl.float32), tl.zeros([BLOCK_M, 2], tl.float32)
    sum_p = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    row = m
    for _ in range(num_predictors):
        a_centre, a_size = load_boxes(answer_ptr, row, axis, inside)
        logits = tl.load(logit_ptr + row[:, None] * num_classes + k[None, :], mask=tile, other=-float("inf"))
        p = tl.sigmoid(logits.to(tl.float32))
        sum_p += p
        delta = tl.minimum(a_size / weight_size, max_log, propagate_nan=tl.PropagateNan.ALL)
        end_centre = (2 * (centre + a_centre / weight_centre * size) - 1) * s
        end_size = (2 * size * tl.exp(delta) - 1) * s
        sum_centre += _clamp(end_centre, -s, s)
        sum_size += _clamp(end_size, -s, s)
        row += num_queries

    tl.store(prob_ptr + m[:, None] * num_classes + k[None, :], sum_p / num_predictors, mask=tile)
    end_centre, end_size = sum_centre / num_predictors, sum_size / num_predictors
    next_centre = _step(x_centre, end_centre, t, t_next, remaining, eps)
    next_size = _step(x_size, end_size, t, t_next, remaining, eps)
    store_boxes(x_1_ptr, end_centre, end_size, m, axis, inside)
    store_boxes(x_next_ptr, next_centre, next_size, m, axis, inside)

    # Pixels of a copy clamped to signal space, clipped to the image. Sizes are height, width.
    extent = tl.load(size_ptr + image[:, None] * 2 + 1 - axis[None, :], mask=inside[:, None], other=1.0)
    centre, half = _share(next_centre, s, 0.0), _share(next_size, s, min_side) / 2
    low, high = _clamp(centre - half, 0.0, 1.0), _clamp(centre + half, 0.0, 1.0)
    store_boxes(box_ptr, low * extent.to(tl.float32), high * extent.to(tl.float32), m, axis, inside)


@torch.library.custom_op("dfm::box_flow_update", mutates_args=())
def box_flow_update(tensors: list[Tensor], numbers: list[float]) -> list[Tensor]:
    """The fields of a BoxFlowUpdate, in one launch.

    Args:
        tensors: the reference's, `x_t` float32. numbers: the signal scale and the four box weights.
    """
    x_t, answers, class_logits, t, t_next, _ = tensors
    num_images, num_proposals = x_t.shape[:2]
    num_queries, num_classes = num_images * num_proposals, class_logits.shape[-1]
    outputs = _empty_outputs(tensors)
    block_k = max(triton.next_power_of_2(num_classes), 2)
    block_m = max(_TILE // block_k, 1)
    if num_queries > 0:
        _box_flow_update_fwd_kernel[(triton.cdiv(num_queries, block_m),)](
            tuple(x.contiguous() for x in tensors),
            tuple(outputs),
            (num_queries, num_proposals, len(answers), num_classes, stride_of(t), stride_of(t_next)),
            (*numbers, MIN_SIDE, MAX_LOG_SCALE, _TIME_EPS),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
        )
    return outputs


def stride_of(t: Tensor) -> int:
    """From an image's t to the next one's, of a contiguous t; one t may serve all images."""
    return int(t.numel() > 1)


def _empty_outputs(tensors: list[Tensor]) -> list[Tensor]:
    x_t, _, class_logits, *_ = tensors
    boxes = [x_t.new_empty(x_t.shape) for _ in range(3)]
    return [*boxes, x_t.new_empty(*x_t.shape[:2], class_logits.shape[-1])]


box_flow_update.register_fake(lambda tensors, *options: _empty_outputs(tensors))
