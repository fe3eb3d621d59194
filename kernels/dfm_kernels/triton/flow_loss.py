"""Triton kernel of the loss of one predictor: four terms and all their gradients in one pass over the logits.

The specification is dfm_kernels.reference.flow_loss; the letters are the same.
Shapes: B images, N proposals, M = B N queries, K classes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_kernels.reference.flow_loss import _AREA_EPS

_BLOCK_M = 4


class FlowLossAndGradients(NamedTuple):
    """terms: `(4,)` float32: cls, l1, giou, velocity. The others are the gradients, float32: of cls by the
    logits `(B, N, K)`, of l1, giou and velocity by x_1_hat `(B, N, 4)`; empty where none were asked for."""

    terms: Tensor
    d_cls: Tensor
    d_l1: Tensor
    d_giou: Tensor
    d_velocity: Tensor


@triton.jit
def _softplus(z):
    """`log(1 + e^z)`, exact for small e^z too."""
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    log1p = tl.where(u == 1, e, tl.log(u) * e / tl.where(u == 1, 1.0, u - 1))
    return tl.maximum(z, 0.0) + log1p


@triton.jit
def _l1_and_sign(x, y, s):
    """`|b_hat - b|` of one coordinate and its derivative by x."""
    difference = (x - y) / (2 * s)
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    return tl.abs(difference), sign / (2 * s)


@triton.jit
def _above(a, b):
    """Derivative of max(a, b) by a; a half where they are equal, as torch has it."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _flow_loss_kernel(
    logit_ptr,
    x_ptr,
    class_ptr,
    target_ptr,
    t_ptr,
    normalizer_ptr,
    partial_ptr,
    d_cls_ptr,
    d_l1_ptr,
    d_giou_ptr,
    d_velocity_ptr,
    num_queries,
    num_proposals,
    num_classes,
    t_stride,
    s,
    alpha,
    gamma,
    velocity_max,
    area_eps,
    QUALITY: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = m < num_queries
    normalizer = tl.load(normalizer_ptr).to(tl.float32)
    target_class = tl.load(class_ptr + m, mask=inside, other=num_classes).to(tl.int32)
    foreground = inside & (target_class < num_classes)
    at = m * 4
    x_cx = tl.load(x_ptr + at, mask=inside, other=0.0)
    x_cy = tl.load(x_ptr + at + 1, mask=inside, other=0.0)
    x_w = tl.load(x_ptr + at + 2, mask=inside, other=0.0)
    x_h = tl.load(x_ptr + at + 3, mask=inside, other=0.0)
    y_cx = tl.load(target_ptr + at, mask=inside, other=0.0)
    y_cy = tl.load(target_ptr + at + 1, mask=inside, other=0.0)
    y_w = tl.load(target_ptr + at + 2, mask=inside, other=0.0)
    y_h = tl.load(target_ptr + at + 3, mask=inside, other=0.0)

    # L1 of normalised boxes.
    l1_cx, d_cx = _l1_and_sign(x_cx, y_cx, s)
    l1_cy, d_cy = _l1_and_sign(x_cy, y_cy, s)
    l1_w, d_w = _l1_and_sign(x_w, y_w, s)
    l1_h, d_h = _l1_and_sign(x_h, y_h, s)
    l1 = tl.where(foreground, l1_cx + l1_cy + l1_w + l1_h, 0.0)
    if GRADIENTS:
        tl.store(d_l1_ptr + at, tl.where(foreground, d_cx / normalizer, 0.0), mask=inside)
        tl.store(d_l1_ptr + at + 1, tl.where(foreground, d_cy / normalizer, 0.0), mask=inside)
        tl.store(d_l1_ptr + at + 2, tl.where(foreground, d_w / normalizer, 0.0), mask=inside)
        tl.store(d_l1_ptr + at + 3, tl.where(foreground, d_h / normalizer, 0.0), mask=inside)

    # Velocity: min((1 - t)^-2, w_max) |x_1_hat - x_1|^2.
    t = tl.load(t_ptr + (m // num_proposals) * t_stride, mask=inside, other=0.0).to(tl.float32)
    weight = tl.minimum(1 / ((1 - t) * (1 - t)), velocity_max)
    e_cx, e_cy, e_w, e_h = x_cx - y_cx, x_cy - y_cy, x_w - y_w, x_h - y_h
    velocity = weight * (e_cx * e_cx + e_cy * e_cy + e_w * e_w + e_h * e_h)
    velocity = tl.where(foreground, velocity, 0.0)
    if GRADIENTS:
        slope = 2 * weight / normalizer
        tl.store(d_velocity_ptr + at, tl.where(foreground, slope * e_cx, 0.0), mask=inside)
        tl.store(d_velocity_ptr + at + 1, tl.where(foreground, slope * e_cy, 0.0), mask=inside)
        tl.store(d_velocity_ptr + at + 2, tl.where(foreground, slope * e_w, 0.0), mask=inside)
        tl.store(d_velocity_ptr + at + 3, tl.where(foreground, slope * e_h, 0.0), mask=inside)

    # GIoU of corners: a is the prediction, b the target.
    a_cx, a_cy, a_w, a_h = (x_cx / s + 1) / 2, (x_cy / s + 1) / 2, (x_w / s + 1) / 2, (x_h / s + 1) / 2
    b_cx, b_cy, b_w, b_h = (y_cx / s + 1) / 2, (y_cy / s + 1) / 2, (y_w / s + 1) / 2, (y_h / s + 1) / 2
    a_x0, a_x1, a_y0, a_y1 = a_cx - a_w / 2, a_cx + a_w / 2, a_cy - a_h / 2, a_cy + a_h / 2
    b_x0, b_x1, b_y0, b_y1 = b_cx - b_w / 2, b_cx + b_w / 2, b_cy - b_h / 2, b_cy + b_h / 2
    wide, high = a_x1 - a_x0, a_y1 - a_y0
    inner_w, inner_h = (
        tl.minimum(a_x1, b_x1) - tl.maximum(a_x0, b_x0),
        tl.minimum(a_y1, b_y1) - tl.maximum(a_y0, b_y0),
    )
    outer_w, outer_h = (
        tl.maximum(a_x1, b_x1) - tl.minimum(a_x0, b_x0),
        tl.maximum(a_y1, b_y1) - tl.minimum(a_y0, b_y0),
    )
    area_a = tl.maximum(wide, 0.0) * tl.maximum(high, 0.0)
    area_b = tl.maximum(b_x1 - b_x0, 0.0) * tl.maximum(b_y1 - b_y0, 0.0)
    intersection = tl.maximum(inner_w, 0.0) * tl.maximum(inner_h, 0.0)
    union = area_a + area_b - intersection
    hull = tl.maximum(outer_w, 0.0) * tl.maximum(outer_h, 0.0)
    union_c, hull_c = tl.maximum(union, area_eps), tl.maximum(hull, area_eps)
    iou = intersection / union_c
    giou = tl.where(foreground, 1 - iou + (hull - union) / hull_c, 0.0)
    if GRADIENTS:
        d_union = tl.where(union >= area_eps, intersection / (union_c * union_c), 0.0) - 1 / hull_c
        d_hull = 1 / hull_c - tl.where(hull >= area_eps, (hull - union) / (hull_c * hull_c), 0.0)
        d_inner = -1 / union_c - d_union
        d_wide = d_union * tl.where(wide >= 0, tl.maximum(high, 0.0), 0.0)
        d_high = d_union * tl.where(high >= 0, tl.maximum(wide, 0.0), 0.0)
        d_inner_w = d_inner * tl.where(inner_w >= 0, tl.maximum(inner_h, 0.0), 0.0)
        d_inner_h = d_inner * tl.where(inner_h >= 0, tl.maximum(inner_w, 0.0), 0.0)
        d_outer_w = d_hull * tl.where(outer_w >= 0, tl.maximum(outer_h, 0.0), 0.0)
        d_outer_h = d_hull * tl.where(outer_h >= 0, tl.maximum(outer_w, 0.0), 0.0)
        d_x1 = d_wide + d_inner_w * _above(b_x1, a_x1) + d_outer_w * _above(a_x1, b_x1)
        d_x0 = -d_wide - d_inner_w * _above(a_x0, b_x0) - d_outer_w * _above(b_x0, a_x0)
        d_y1 = d_high + d_inner_h * _above(b_y1, a_y1) + d_outer_h * _above(a_y1, b_y1)
        d_y0 = -d_high - d_inner_h * _above(a_y0, b_y0) - d_outer_h * _above(b_y0, a_y0)
        slope = 1 / (2 * s * normalizer)
        tl.store(d_giou_ptr + at, tl.where(foreground, slope * (d_x0 + d_x1), 0.0), mask=inside)
        tl.store(d_giou_ptr + at + 1, tl.where(foreground, slope * (d_y0 + d_y1), 0.0), mask=inside)
        tl.store(d_giou_ptr + at + 2, tl.where(foreground, slope * (d_x1 - d_x0) / 2, 0.0), mask=inside)
        tl.store(d_giou_ptr + at + 3, tl.where(foreground, slope * (d_y1 - d_y0) / 2, 0.0), mask=inside)

    # Classes, a tile at a time.
    quality = tl.minimum(tl.maximum(iou, 0.0), 1.0)
    cls = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_classes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = inside[:, None] & (k < num_classes)[None, :]
        where = m[:, None] * num_classes + k[None, :]
        z = tl.load(logit_ptr + where, mask=tile, other=0.0).to(tl.float32)
        is_target = target_class[:, None] == k[None, :]
        if QUALITY:
            p = tl.sigmoid(z)
            q = tl.where(is_target, quality[:, None], 0.0)
            entropy = _softplus(z) - q * z
            distance = tl.abs(p - q)
            power = tl.where(distance > 0, tl.exp(gamma * tl.log(distance)), 0.0)
            if gamma == 0:
                power = tl.full([BLOCK_M, BLOCK_K], 1.0, tl.float32)
            loss = power * entropy
            if GRADIENTS:
                # d|p - q|^gamma / dz = gamma |p - q|^gamma / (p - q) p (1 - p)
                d_power = tl.where(distance > 0, gamma * power / tl.where(distance > 0, p - q, 1.0), 0.0)
                d = d_power * p * (1 - p) * entropy + power * (p - q)
        else:
            sign = tl.where(is_target, 1.0, -1.0)
            share = tl.where(is_target, alpha, 1 - alpha)
            # With z_y = +-z: p_y = sigmoid(z_y) and 1 - p_y = exp(-softplus(z_y)).
            wrong = tl.sigmoid(-sign * z)
            entropy = _softplus(-sign * z)
            power = share * tl.exp(-gamma * _softplus(sign * z))
            loss = power * entropy
            if GRADIENTS:
                d = -sign * power * (gamma * (1 - wrong) * entropy + wrong)
        cls += tl.sum(tl.where(tile, loss, 0.0), axis=1)
        if GRADIENTS:
            tl.store(d_cls_ptr + where, d / normalizer, mask=tile)

    # Sums of this program's queries; the host adds them up in a fixed order.
    out = partial_ptr + tl.program_id(0) * 4
    tl.store(out, tl.sum(cls, axis=0) / normalizer)
    tl.store(out + 1, tl.sum(l1, axis=0) / normalizer)
    tl.store(out + 2, tl.sum(giou, axis=0) / normalizer)
    tl.store(out + 3, tl.sum(velocity, axis=0) / normalizer)


def block_k(num_classes: int) -> int:
    """Classes of one tile."""
    return min(max(triton.next_power_of_2(num_classes), 2), 128)


def flow_loss(
    class_logits: Tensor,
    x_1_hat: Tensor,
    target_classes: Tensor,
    target_x_1: Tensor,
    t: Tensor,
    normalizer: Tensor,
    signal_scale: float,
    kind: str,
    alpha: float,
    gamma: float,
    velocity_max: float,
    gradients: bool,
) -> FlowLossAndGradients:
    """The arguments of the reference; `x_1_hat` and `target_x_1` float32, K at least 1."""
    num_images, num_proposals, num_classes = class_logits.shape
    num_queries = num_images * num_proposals
    programs = triton.cdiv(num_queries, _BLOCK_M)
    partial = x_1_hat.new_empty(programs, 4)
    shapes = [class_logits.shape, *[x_1_hat.shape] * 3] if gradients else [(0,)] * 4
    found = [torch.empty(shape, dtype=torch.float32, device=x_1_hat.device) for shape in shapes]
    if num_queries > 0:
        _flow_loss_kernel[(programs,)](
            class_logits.contiguous(),
            x_1_hat.contiguous(),
            target_classes.contiguous(),
            target_x_1.contiguous(),
            t,
            normalizer,
            partial,
            *found,
            num_queries,
            num_proposals,
            num_classes,
            t.stride(0) if t.dim() and t.shape[0] > 1 else 0,
            signal_scale,
            alpha,
            gamma,
            velocity_max,
            _AREA_EPS,
            QUALITY=kind == "quality_focal",
            GRADIENTS=gradients,
            BLOCK_M=_BLOCK_M,
            BLOCK_K=block_k(num_classes),
        )
    return FlowLossAndGradients(partial.sum(0), *found)
