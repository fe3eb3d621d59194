"""Triton kernel of the loss of one predictor: four terms and all their gradients in one pass over the logits.

The specification is the reference; the letters are the same. A tile `(M, 2)` holds the centres or the sizes
of boxes, along x and along y.
Shapes: B images, N proposals, M = B N queries, K classes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfm_kernels.box_flow_update.triton import load_boxes, store_boxes, stride_of
from dfm_kernels.flow_loss.reference import _AREA_EPS

_BLOCK_M = 4


@triton.jit
def _softplus(z):
    """`log(1 + e^z)`, exact for small e^z too."""
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    log1p = tl.where(u == 1, e, tl.log(u) * e / tl.where(u == 1, 1.0, u - 1))
    return tl.maximum(z, 0.0) + log1p


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _above(a, b):
    """Derivative of max(a, b) by a; a half where they are equal, as torch has it."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _area(side):
    """Product `(M,)` of the two sides `(M, 2)`, each at least 0."""
    width, height = tl.split(tl.maximum(side, 0.0))
    return width * height


@triton.jit
def _d_area(side):
    """Derivative of `_area` by each side: the other one."""
    width, height = tl.split(tl.maximum(side, 0.0))
    return tl.where(side >= 0, tl.join(height, width), 0.0)


@triton.jit
def _corners(centre, size, s):
    """Low and high corner, normalised, of boxes in signal space."""
    centre, half = (centre / s + 1) / 2, (size / s + 1) / 2 / 2
    return centre - half, centre + half


@triton.jit
def _flow_loss_kernel(
    inputs,
    partial_ptr,
    gradients,
    counts,
    numbers,
    GRADIENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    logit_ptr, x_ptr, class_ptr, target_ptr, t_ptr, normalizer_ptr = inputs
    d_cls_ptr, d_l1_ptr, d_giou_ptr, d_velocity_ptr = gradients
    num_queries, num_proposals, num_classes, t_stride = counts
    s, gamma, velocity_max, area_eps = numbers
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    axis = tl.arange(0, 2)
    inside = m < num_queries
    normalizer = tl.load(normalizer_ptr).to(tl.float32)
    target_class = tl.load(class_ptr + m, mask=inside, other=num_classes).to(tl.int32)
    foreground = inside & (target_class < num_classes)
    boxes = foreground[:, None]
    x_centre, x_size = load_boxes(x_ptr, m, axis, inside)
    y_centre, y_size = load_boxes(target_ptr, m, axis, inside)
    e_centre, e_size = x_centre - y_centre, x_size - y_size

    # L1 of normalised boxes.
    l1 = tl.sum(tl.where(boxes, tl.abs(e_centre / (2 * s)) + tl.abs(e_size / (2 * s)), 0.0), axis=1)
    # Velocity: min((1 - t)^-2, w_max) |x_1_hat - x_1|^2.
    t = tl.load(t_ptr + (m // num_proposals) * t_stride, mask=inside, other=0.0).to(tl.float32)[:, None]
    weight = tl.minimum(1 / ((1 - t) * (1 - t)), velocity_max)
    velocity = tl.where(boxes, weight * (e_centre * e_centre + e_size * e_size), 0.0)
    velocity = tl.sum(velocity, axis=1)
    if GRADIENTS:
        d_centre = tl.where(boxes, _sign(e_centre) / (2 * s) / normalizer, 0.0)
        d_size = tl.where(boxes, _sign(e_size) / (2 * s) / normalizer, 0.0)
        store_boxes(d_l1_ptr, d_centre, d_size, m, axis, inside)
        slope = 2 * weight / normalizer
        d_centre, d_size = tl.where(boxes, slope * e_centre, 0.0), tl.where(boxes, slope * e_size, 0.0)
        store_boxes(d_velocity_ptr, d_centre, d_size, m, axis, inside)

    # GIoU of corners: a is the prediction, b the target.
    a_low, a_high = _corners(x_centre, x_size, s)
    b_low, b_high = _corners(y_centre, y_size, s)
    side = a_high - a_low
    inner = tl.minimum(a_high, b_high) - tl.maximum(a_low, b_low)
    outer = tl.maximum(a_high, b_high) - tl.minimum(a_low, b_low)
    intersection, hull = _area(inner), _area(outer)
    union = _area(side) + _area(b_high - b_low) - intersection
    union_c, hull_c = tl.maximum(union, area_eps), tl.maximum(hull, area_eps)
    iou = intersection / union_c
    giou = tl.where(foreground, 1 - iou + (hull - union) / hull_c, 0.0)
    if GRADIENTS:
        d_union = tl.where(union >= area_eps, intersection / (union_c * union_c), 0.0) - 1 / hull_c
        d_hull = 1 / hull_c - tl.where(hull >= area_eps, (hull - union) / (hull_c * hull_c), 0.0)
        d_side = d_union[:, None] * _d_area(side)
        d_inner = (-1 / union_c - d_union)[:, None] * _d_area(inner)
        d_outer = d_hull[:, None] * _d_area(outer)
        d_high = d_side + d_inner * _above(b_high, a_high) + d_outer * _above(a_high, b_high)
        d_low = -d_side - d_inner * _above(a_low, b_low) - d_outer * _above(b_low, a_low)
        slope = 1 / (2 * s * normalizer)
        d_centre = tl.where(boxes, slope * (d_low + d_high), 0.0)
        d_size = tl.where(boxes, slope * (d_high - d_low) / 2, 0.0)
        store_boxes(d_giou_ptr, d_centre, d_size, m, axis, inside)

    # Classes, a tile at a time.
    quality = tl.minimum(tl.maximum(iou, 0.0), 1.0)
    cls = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_classes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = inside[:, None] & (k < num_classes)[None, :]
        where = m[:, None] * num_classes + k[None, :]
        z = tl.load(logit_ptr + where, mask=tile, other=0.0).to(tl.float32)
        is_target = target_class[:, None] == k[None, :]
        p = tl.sigmoid(z)
        q = tl.where(is_target, quality[:, None], 0.0)
        entropy = _softplus(z) - q * z
        distance = tl.abs(p - q)
        power = tl.where(distance > 0, tl.exp(gamma * tl.log(distance)), 0.0)
        if gamma == 0:
            power = tl.full([BLOCK_M, BLOCK_K], 1.0, tl.float32)
        cls += tl.sum(tl.where(tile, power * entropy, 0.0), axis=1)
        if GRADIENTS:
            # d|p - q|^gamma / dz = gamma |p - q|^gamma / (p - q) p (1 - p)
            d_power = tl.where(distance > 0, gamma * power / tl.where(distance > 0, p - q, 1.0), 0.0)
            d = d_power * p * (1 - p) * entropy + power * (p - q)
            tl.store(d_cls_ptr + where, d / normalizer, mask=tile)

    # Sums of this program's queries; the host adds them up in a fixed order.
    out = partial_ptr + tl.program_id(0) * 4
    tl.store(out, tl.sum(cls, axis=0) / normalizer)
    tl.store(out + 1, tl.sum(l1, axis=0) / normalizer)
    tl.store(out + 2, tl.sum(giou, axis=0) / normalizer)
    tl.store(out + 3, tl.sum(velocity, axis=0) / normalizer)


@torch.library.custom_op("dfm::flow_loss", mutates_args=())
def flow_loss(tensors: list[Tensor], numbers: list[float], gradients: bool) -> list[Tensor]:
    """The four terms `(4,)` and, where asked for, their gradients, all of them float32.

    The gradients are those of cls by the logits `(B, N, K)`, of l1, giou and velocity by `x_1_hat`
    `(B, N, 4)`; empty otherwise.

    Args:
        tensors: the reference's; `x_1_hat` and `target_x_1` float32, K at least 1.
        numbers: signal scale, gamma, velocity_max.
    """
    num_images, num_proposals, num_classes = tensors[0].shape
    num_queries = num_images * num_proposals
    programs = triton.cdiv(num_queries, _BLOCK_M)
    partial = tensors[1].new_empty(programs, 4)
    found = _empty_gradients(tensors, gradients)
    if num_queries > 0:
        _flow_loss_kernel[(programs,)](
            tuple(x.contiguous() for x in tensors),
            partial,
            tuple(found),
            (num_queries, num_proposals, num_classes, stride_of(tensors[4])),
            (*numbers, _AREA_EPS),
            GRADIENTS=gradients,
            BLOCK_M=_BLOCK_M,
            BLOCK_K=min(max(triton.next_power_of_2(num_classes), 2), 128),
        )
    return [partial.sum(0), *found]


def _empty_gradients(tensors: list[Tensor], gradients: bool) -> list[Tensor]:
    class_logits, x_1_hat, *_ = tensors
    shapes = [class_logits.shape, *[x_1_hat.shape] * 3] if gradients else [(0,)] * 4
    return [x_1_hat.new_empty(shape, dtype=torch.float32) for shape in shapes]


@flow_loss.register_fake
def _(tensors, numbers, gradients):
    return [tensors[1].new_empty(4), *_empty_gradients(tensors, gradients)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.logits_dtype = inputs[0][0].dtype


@once_differentiable
def _scaled(ctx, d_terms):
    """By logits and `x_1_hat`: the forward wrote the gradients, they are only scaled."""
    d_cls, d_l1, d_giou, d_velocity = ctx.saved_tensors
    w_cls, w_l1, w_giou, w_velocity = d_terms.unbind()
    d_boxes = w_l1 * d_l1 + w_giou * d_giou + w_velocity * d_velocity
    return (w_cls * d_cls).to(ctx.logits_dtype), d_boxes


def _gradients(ctx, d_outputs):
    return [*_scaled(ctx, d_outputs[0]), *[None] * 4], None, None


flow_loss.register_autograd(_gradients, setup_context=_setup_context)
