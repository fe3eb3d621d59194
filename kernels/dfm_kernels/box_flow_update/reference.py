"""Box flow of one solver step: deltas to endpoint, aggregation over predictors, Euler step, pixel boxes.

Shapes: B images, N proposals, D predictors, K classes. Signal space: normalised cxcywh boxes `b` as
`x = (2 b - 1) s` with signal scale `s`. Pixel space: `boxes_xyxy`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Least side of a proposal, as a share of the image: a box of zero width has no features, and no
# multiplicative delta could make it grow again.
MIN_SIDE = 1e-2
# Greatest logarithm by which one prediction may grow a side.
MAX_LOG_SCALE = math.log(1000.0 / 16)
# 1 - t below this counts as t = 1, where a step has nothing left to go.
_TIME_EPS = 1e-6


class BoxFlowUpdate(NamedTuple):
    """What one step yields.

    x_next: `(B, N, 4)` signal. x_1_hat: `(B, N, 4)` signal, the aggregated endpoint, clamped to [-s, s].
    boxes_xyxy: `(B, N, 4)` pixels, of `x_next`, inside the image.
    class_probs: `(B, N, K)`.
    """

    x_next: Tensor
    x_1_hat: Tensor
    boxes_xyxy: Tensor
    class_probs: Tensor


def expand_t(t: Tensor, like: Tensor) -> Tensor:
    """`t` of shape `()` or `(B,)` as `(B, 1, ...)` (or `()`), in the dtype of `like` `(B, ...)`.

    Raises:
        ValueError: `t` has another shape.
    """
    if t.dim() == 0:
        return t.to(like.dtype)
    if t.dim() != 1 or t.shape[0] not in (1, like.shape[0]):
        raise ValueError(f"t must have shape () or ({like.shape[0]},), got {tuple(t.shape)}")
    return t.to(like.dtype).reshape(-1, *([1] * (like.dim() - 1)))


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """`(..., 4)` centre and size to corners."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """`(..., 4)` corners to centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def signal_to_cxcywh(x: Tensor, signal_scale: float) -> Tensor:
    """`b = (x / s + 1) / 2`: signal `(..., 4)` to normalised cxcywh."""
    return (x / signal_scale + 1) / 2


def boxes_to_signal(boxes_cxcywh: Tensor, signal_scale: float) -> Tensor:
    """`x = (2 b - 1) s`: normalised cxcywh `(..., 4)` to signal."""
    return (2 * boxes_cxcywh - 1) * signal_scale


def _proposal_cxcywh(x_t: Tensor, signal_scale: float) -> Tensor:
    """The normalised box that enters a predictor: a clamped copy of `x_t`, sides at least MIN_SIDE."""
    boxes = signal_to_cxcywh(x_t, signal_scale).clamp(0, 1)
    return torch.cat([boxes[..., :2], boxes[..., 2:].clamp(min=MIN_SIDE)], dim=-1)


def signal_to_boxes_xyxy(x_t: Tensor, image_sizes: Tensor, signal_scale: float) -> Tensor:
    """Pixel boxes of a copy of `x_t` clamped to signal space, clipped to the image.

    Args:
        x_t: `(B, N, 4)` signal.
        image_sizes: `(B, 2)` height and width in pixels.

    Returns:
        `(B, N, 4)` pixels, `0 <= x0 <= x1 <= width`.
    """
    boxes = cxcywh_to_xyxy(_proposal_cxcywh(x_t, signal_scale)).clamp(0, 1)
    height, width = image_sizes.to(boxes.dtype).unbind(-1)
    return boxes * torch.stack([width, height, width, height], dim=-1)[:, None]


def decode_endpoint(
    x_t: Tensor, answer: Tensor, *, signal_scale: float, box_weights: tuple[float, float, float, float]
) -> Tensor:
    """A predictor's raw answer to its endpoint `x_1_hat`, not clamped.

    `answer` is a delta of the proposal as in Faster R-CNN (arXiv 1506.01497, eq. 2):
    `cx = cx_t + (a_x / w_x) w_t`, `w = w_t exp(a_w / w_w)`.

    Args:
        x_t: `(B, N, 4)` signal. answer: `(B, N, 4)`.

    Returns:
        `(B, N, 4)` signal.
    """
    proposal = _proposal_cxcywh(x_t, signal_scale)
    # A tensor of the weights would have to be brought to the device.
    delta = torch.stack([a / w for a, w in zip(answer.unbind(-1), box_weights)], dim=-1)
    center = proposal[..., :2] + delta[..., :2] * proposal[..., 2:]
    size = proposal[..., 2:] * torch.exp(delta[..., 2:].clamp(max=MAX_LOG_SCALE))
    return boxes_to_signal(torch.cat([center, size], dim=-1), signal_scale)


def euler_step(x_t: Tensor, x_1_hat: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """`x_t + (t_next - t) / (1 - t) (x_1_hat - x_t)`; exactly `x_1_hat` at `t_next = 1`.

    Args:
        x_t, x_1_hat: `(B, ...)`. t, t_next: `()` or `(B,)`, with t <= t_next.
    """
    t, t_next = expand_t(t, x_t), expand_t(t_next, x_t)
    remaining = 1 - t
    share = ((t_next - t) / remaining.clamp(min=_TIME_EPS)).clamp(0, 1)
    return torch.where(t_next >= 1, x_1_hat, x_t + share * (x_1_hat - x_t))


def aggregate(x_1_hat: Tensor, class_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over predictors, of endpoints and of class probabilities.

    All predictors stand at the same `(x_t, t)`, so that averaging endpoints is averaging velocities.

    Args:
        x_1_hat: `(D, B, N, 4)`. class_logits: `(D, B, N, K)`.

    Returns:
        `(B, N, 4)` endpoints and `(B, N, K)` probabilities.
    """
    probs = class_logits.to(x_1_hat.dtype).sigmoid()
    if x_1_hat.shape[0] == 1:
        return x_1_hat[0], probs[0]
    return x_1_hat.mean(0), probs.mean(0)


def box_flow_update(
    x_t: Tensor,
    answers: Tensor,
    class_logits: Tensor,
    t: Tensor,
    t_next: Tensor,
    image_sizes: Tensor,
    *,
    signal_scale: float,
    box_weights: tuple[float, float, float, float],
) -> BoxFlowUpdate:
    """The specification of the op, which says what the arguments are."""
    options = {"signal_scale": signal_scale, "box_weights": box_weights}
    endpoints = [decode_endpoint(x_t, a, **options) for a in answers.to(x_t.dtype)]
    endpoints = torch.stack(endpoints).clamp(-signal_scale, signal_scale)
    x_1_hat, class_probs = aggregate(endpoints, class_logits)
    x_next = euler_step(x_t, x_1_hat, t, t_next)
    boxes_xyxy = signal_to_boxes_xyxy(x_next, image_sizes, signal_scale)
    return BoxFlowUpdate(x_next, x_1_hat, boxes_xyxy, class_probs)
