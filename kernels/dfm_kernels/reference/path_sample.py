"""One point of the linear (conditional optimal transport) path.

Shapes: B images, N proposals, D predictors; any leading and trailing dimensions in general.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dfm_kernels.reference.box_flow_update import expand_t, signal_to_boxes_xyxy
from dfm_kernels.reference.philox import philox_normal


def path_sample(x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """`x_t = (1 - t) x_0 + t x_1` and `dx_t = x_1 - x_0`.

    Args:
        x_0, x_1: noise and data, `(B, ...)`.
        t: `()` or `(B,)`, in [0, 1].

    Returns:
        `x_t` and `dx_t`, both `(B, ...)`. At t = 0 and t = 1 `x_t` is exactly `x_0` and `x_1`.
    """
    t = expand_t(t, x_1)
    return (1 - t) * x_0 + t * x_1, x_1 - x_0


class BoxPathSample(NamedTuple):
    """D points of one path a query.

    x_0, dx_t: `(B, N, 4)` signal, noise and conditional velocity. x_t: `(D, B, N, 4)` signal.
    boxes_xyxy: `(D, B, N, 4)` pixels, of `x_t`, inside the image.
    """

    x_0: Tensor
    x_t: Tensor
    dx_t: Tensor
    boxes_xyxy: Tensor


def sample_box_paths(
    seed: Tensor,
    offset: Tensor | int,
    x_1: Tensor,
    t: Tensor,
    image_sizes: Tensor,
    *,
    signal_scale: float,
) -> BoxPathSample:
    """Noise `x_0` of (seed, offset), and the points of its path to `x_1` at D different t.

    Args:
        seed: `(B,)` int64. offset: int64, the stream. x_1: `(B, N, 4)` signal. t: `(D, B)` in [0, 1].
        image_sizes: `(B, 2)` height, width.
    """
    x_0 = philox_normal(seed, offset, x_1.shape[1]).to(x_1.dtype)
    points = [path_sample(x_0, x_1, time)[0] for time in t]
    x_t = torch.stack(points) if points else x_1.new_empty(0, *x_1.shape)
    boxes = [signal_to_boxes_xyxy(point, image_sizes, signal_scale) for point in points]
    return BoxPathSample(x_0, x_t, x_1 - x_0, torch.stack(boxes) if boxes else torch.empty_like(x_t))
