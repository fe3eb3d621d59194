"""Loss of one predictor in one pass: classes, L1, GIoU and velocity.

Shapes: B images, N proposals, K classes. A target class of K is background.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dfm_kernels.box_flow_update.reference import cxcywh_to_xyxy, expand_t, signal_to_cxcywh

_AREA_EPS = 1e-7


class FlowLoss(NamedTuple):
    """Four scalars, not weighted, each a sum over queries divided by the normaliser."""

    cls: Tensor
    l1: Tensor
    giou: Tensor
    velocity: Tensor


def paired_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU (arXiv 1902.09630, alg. 1) of corner boxes `(..., 4)`, pair by pair: `(...)`."""
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    iou = intersection / union.clamp(min=_AREA_EPS)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return iou, iou - (hull - union) / hull.clamp(min=_AREA_EPS)


def pairwise_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of every box of `a` `(N, 4)` with every box of `b` `(M, 4)`: `(N, M)`."""
    return paired_giou(a[:, None], b[None])


def flow_loss(
    class_logits: Tensor,
    x_1_hat: Tensor,
    target_classes: Tensor,
    target_x_1: Tensor,
    t: Tensor,
    normalizer: Tensor,
    *,
    signal_scale: float,
    gamma: float,
    velocity_max: float,
) -> FlowLoss:
    """Class loss over all queries, box losses over foreground queries.

    cls, quality focal (arXiv 2006.04388, eq. 5): `|q - p|^gamma BCE(p, q)`, q the IoU with the target;
    l1: `|b_hat - b|` of normalised cxcywh; giou: `1 - GIoU`;
    velocity: `min((1 - t)^-2, w_max) |x_1_hat - x_1|^2`, the velocity error of the endpoint, bounded.

    The op says what the arguments are.
    """
    num_classes = class_logits.shape[-1]
    logits = class_logits.to(x_1_hat.dtype)
    foreground = target_classes < num_classes
    one_hot = torch.nn.functional.one_hot(target_classes, num_classes + 1)[..., :num_classes].to(logits.dtype)

    box_hat = signal_to_cxcywh(x_1_hat, signal_scale)
    box = signal_to_cxcywh(target_x_1, signal_scale)
    iou, giou = paired_giou(cxcywh_to_xyxy(box_hat), cxcywh_to_xyxy(box))

    probs = logits.sigmoid()
    wanted = one_hot * iou.detach().clamp(0, 1)[..., None]
    weight = (wanted - probs).abs() ** gamma
    cls = weight * binary_cross_entropy_with_logits(logits, wanted, reduction="none")

    # Multiplying background rows by zero would turn their infinities into NaN; select instead.
    zero = x_1_hat.new_zeros(())
    l1 = torch.where(foreground, (box_hat - box).abs().sum(-1), zero)
    giou_loss = torch.where(foreground, 1 - giou, zero)
    weight = (1 - expand_t(t, x_1_hat)).pow(-2).clamp(max=velocity_max)
    velocity = torch.where(foreground[..., None], weight * (x_1_hat - target_x_1) ** 2, zero).sum(-1)
    return FlowLoss(*(term.sum() / normalizer for term in (cls, l1, giou_loss, velocity)))
