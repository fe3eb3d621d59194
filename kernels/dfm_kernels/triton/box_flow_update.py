"""Triton kernel of the box-flow update: one launch between the heads of a step and the RoIAlign of the next.

The specification is dfm_kernels.reference.box_flow_update; the letters are the same.
Shapes: B images, N proposals, M = B N queries, D predictors, K classes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_kernels.reference.box_flow_update import _TIME_EPS, MAX_LOG_SCALE, MIN_SIDE, BoxFlowUpdate

# All classes of a query are in one tile, so that its greatest probability needs no second pass.
MAX_CLASSES = 8192
# Elements of a tile of (queries, classes): 8 registers a thread with 4 warps.
_TILE = 1024


@triton.jit
def _clamp(x, low, high):
    """torch.clamp: a NaN stays one."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _side(x, s, min_side):
    """A side of the proposal as a share of the image: at least min_side."""
    return _clamp((x / s + 1) / 2, min_side, 1.0)


@triton.jit
def _signal(b, s):
    """`x = (2 b - 1) s`, clamped to signal space."""
    return _clamp((2 * b - 1) * s, -s, s)


@triton.jit
def _decode(x, a, c, side, remaining, w, s, VELOCITY: tl.constexpr, IS_SIZE: tl.constexpr, max_log):
    """One coordinate of a predictor's endpoint, clamped to signal space.

    x: x_t. a: raw answer. c: the proposal's centre (or side, for a size). side: the proposal's side.
    """
    if VELOCITY:
        return _clamp(x + remaining * a, -s, s)
    delta = a / w
    if IS_SIZE:
        return _signal(c * tl.exp(tl.minimum(delta, max_log, propagate_nan=tl.PropagateNan.ALL)), s)
    return _signal(c + delta * side, s)


@triton.jit
def _step(x, x_1, t, t_next, remaining, eps):
    """Euler: `x + (t_next - t) / (1 - t) (x_1 - x)`, exactly `x_1` at t_next = 1; and the velocity."""
    share = _clamp((t_next - t) / tl.maximum(remaining, eps), 0.0, 1.0)
    x_next = tl.where(t_next >= 1, x_1, x + share * (x_1 - x))
    velocity = tl.where(remaining > eps, (x_1 - x) / tl.maximum(remaining, eps), 0.0)
    return x_next, velocity


@triton.jit
def _box_flow_update_fwd_kernel(
    x_ptr,
    answer_ptr,
    logit_ptr,
    t_ptr,
    t_next_ptr,
    size_ptr,
    x_next_ptr,
    x_1_ptr,
    velocity_ptr,
    box_ptr,
    prob_ptr,
    num_queries,
    num_proposals,
    num_predictors,
    num_classes,
    t_stride,
    t_next_stride,
    s,
    w_x,
    w_y,
    w_w,
    w_h,
    min_side,
    max_log,
    eps,
    VELOCITY: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = m < num_queries
    tile = inside[:, None] & (k < num_classes)[None, :]
    image = m // num_proposals
    t = tl.load(t_ptr + image * t_stride, mask=inside, other=0.0).to(tl.float32)
    t_next = tl.load(t_next_ptr + image * t_next_stride, mask=inside, other=0.0).to(tl.float32)
    remaining = 1 - t
    x_cx = tl.load(x_ptr + m * 4, mask=inside, other=0.0)
    x_cy = tl.load(x_ptr + m * 4 + 1, mask=inside, other=0.0)
    x_w = tl.load(x_ptr + m * 4 + 2, mask=inside, other=0.0)
    x_h = tl.load(x_ptr + m * 4 + 3, mask=inside, other=0.0)
    cx, cy = _side(x_cx, s, 0.0), _side(x_cy, s, 0.0)
    w, h = _side(x_w, s, min_side), _side(x_h, s, min_side)

    sum_cx = tl.zeros([BLOCK_M], tl.float32)
    sum_cy = tl.zeros([BLOCK_M], tl.float32)
    sum_w = tl.zeros([BLOCK_M], tl.float32)
    sum_h = tl.zeros([BLOCK_M], tl.float32)
    sum_p = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    row = m
    for _ in range(num_predictors):
        a = answer_ptr + row * 4
        a_cx = tl.load(a, mask=inside, other=0.0).to(tl.float32)
        a_cy = tl.load(a + 1, mask=inside, other=0.0).to(tl.float32)
        a_w = tl.load(a + 2, mask=inside, other=0.0).to(tl.float32)
        a_h = tl.load(a + 3, mask=inside, other=0.0).to(tl.float32)
        logits = tl.load(logit_ptr + row[:, None] * num_classes + k[None, :], mask=tile, other=-float("inf"))
        p = tl.sigmoid(logits.to(tl.float32))
        weight = tl.full([BLOCK_M], 1.0, tl.float32)
        if CONFIDENCE:
            weight = tl.max(p, axis=1)
        total += weight
        sum_p += weight[:, None] * p
        sum_cx += weight * _decode(x_cx, a_cx, cx, w, remaining, w_x, s, VELOCITY, False, max_log)
        sum_cy += weight * _decode(x_cy, a_cy, cy, h, remaining, w_y, s, VELOCITY, False, max_log)
        sum_w += weight * _decode(x_w, a_w, w, w, remaining, w_w, s, VELOCITY, True, max_log)
        sum_h += weight * _decode(x_h, a_h, h, h, remaining, w_h, s, VELOCITY, True, max_log)
        row += num_queries
    total = tl.maximum(total, 1.1754943508222875e-38)  # the least normal float32, as in the reference

    out = m * 4
    x_1_cx, x_1_cy, x_1_w, x_1_h = sum_cx / total, sum_cy / total, sum_w / total, sum_h / total
    n_cx, v_cx = _step(x_cx, x_1_cx, t, t_next, remaining, eps)
    n_cy, v_cy = _step(x_cy, x_1_cy, t, t_next, remaining, eps)
    n_w, v_w = _step(x_w, x_1_w, t, t_next, remaining, eps)
    n_h, v_h = _step(x_h, x_1_h, t, t_next, remaining, eps)
    tl.store(x_1_ptr + out, x_1_cx, mask=inside)
    tl.store(x_1_ptr + out + 1, x_1_cy, mask=inside)
    tl.store(x_1_ptr + out + 2, x_1_w, mask=inside)
    tl.store(x_1_ptr + out + 3, x_1_h, mask=inside)
    tl.store(x_next_ptr + out, n_cx, mask=inside)
    tl.store(x_next_ptr + out + 1, n_cy, mask=inside)
    tl.store(x_next_ptr + out + 2, n_w, mask=inside)
    tl.store(x_next_ptr + out + 3, n_h, mask=inside)
    tl.store(velocity_ptr + out, v_cx, mask=inside)
    tl.store(velocity_ptr + out + 1, v_cy, mask=inside)
    tl.store(velocity_ptr + out + 2, v_w, mask=inside)
    tl.store(velocity_ptr + out + 3, v_h, mask=inside)
    tl.store(prob_ptr + m[:, None] * num_classes + k[None, :], sum_p / total[:, None], mask=tile)

    # Pixels of a copy clamped to signal space, clipped to the image.
    height = tl.load(size_ptr + image * 2, mask=inside, other=1.0).to(tl.float32)
    width = tl.load(size_ptr + image * 2 + 1, mask=inside, other=1.0).to(tl.float32)
    cx, cy = _side(n_cx, s, 0.0), _side(n_cy, s, 0.0)
    w, h = _side(n_w, s, min_side), _side(n_h, s, min_side)
    tl.store(box_ptr + out, _clamp(cx - w / 2, 0.0, 1.0) * width, mask=inside)
    tl.store(box_ptr + out + 1, _clamp(cy - h / 2, 0.0, 1.0) * height, mask=inside)
    tl.store(box_ptr + out + 2, _clamp(cx + w / 2, 0.0, 1.0) * width, mask=inside)
    tl.store(box_ptr + out + 3, _clamp(cy + h / 2, 0.0, 1.0) * height, mask=inside)


def block_sizes(num_classes: int) -> tuple[int, int]:
    """Queries and classes of one program's tile."""
    block_k = max(triton.next_power_of_2(num_classes), 2)
    return max(_TILE // block_k, 1), block_k


def box_flow_update(
    x_t: Tensor,
    answers: Tensor,
    class_logits: Tensor,
    t: Tensor,
    t_next: Tensor,
    image_sizes: Tensor,
    signal_scale: float,
    box_weights: tuple[float, float, float, float],
    prediction: str,
    aggregation: str,
) -> BoxFlowUpdate:
    """One launch; the arguments of the reference, `x_t` float32, K at most MAX_CLASSES."""
    num_images, num_proposals = x_t.shape[:2]
    num_predictors, num_classes = answers.shape[0], class_logits.shape[-1]
    x_t, answers, class_logits = x_t.contiguous(), answers.contiguous(), class_logits.contiguous()
    x_next, x_1_hat, velocity, boxes_xyxy = (torch.empty_like(x_t) for _ in range(4))
    class_probs = x_t.new_empty(num_images, num_proposals, num_classes)
    result = BoxFlowUpdate(x_next, x_1_hat, velocity, boxes_xyxy, class_probs)
    num_queries = num_images * num_proposals
    if num_queries == 0:
        return result
    block_m, block_k = block_sizes(num_classes)
    _box_flow_update_fwd_kernel[(triton.cdiv(num_queries, block_m),)](
        x_t,
        answers,
        class_logits,
        t,
        t_next,
        image_sizes.contiguous(),
        *result,
        num_queries,
        num_proposals,
        num_predictors,
        num_classes,
        t.stride(0) if t.dim() and t.shape[0] > 1 else 0,
        t_next.stride(0) if t_next.dim() and t_next.shape[0] > 1 else 0,
        signal_scale,
        *box_weights,
        MIN_SIDE,
        MAX_LOG_SCALE,
        _TIME_EPS,
        VELOCITY=prediction == "velocity",
        # One predictor's weight cancels, but for a probability of exactly 0.
        CONFIDENCE=aggregation == "confidence" and num_predictors > 1,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
    )
    return result
