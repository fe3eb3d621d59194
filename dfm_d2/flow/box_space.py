"""Boxes as points of signal space: `x = (2 b - 1) s` of normalised cxcywh boxes `b`.

Shapes: B images, N boxes. Pixel boxes are `boxes_xyxy`; image sizes are `(B, 2)` height, width.
"""

from dataclasses import dataclass

import torch
from dfm_kernels.box_flow_update import (
    boxes_to_signal,
    cxcywh_to_xyxy,
    decode_endpoint,
    signal_to_boxes_xyxy,
    signal_to_cxcywh,
    xyxy_to_cxcywh,
)
from torch import Tensor


def _pixel_scale(image_size: Tensor) -> Tensor:
    height, width = image_size.unbind(-1)
    return torch.stack([width, height, width, height], dim=-1)


@dataclass(frozen=True)
class BoxSpace:
    """Maps from pixels and from raw answers of predictors to signal space, and back to pixels.

    Args:
        signal_scale: s > 0; data lies in [-s, s]. box_weights: divide box deltas.
    """

    signal_scale: float = 2.0
    box_weights: tuple[float, float, float, float] = (2.0, 2.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if not self.signal_scale > 0:
            raise ValueError(f"signal_scale must be greater than 0, got {self.signal_scale}")

    def encode(self, boxes_xyxy: Tensor, image_size: Tensor) -> Tensor:
        """Pixel boxes `(..., N, 4)` of an image of size `(..., 2)` to signal."""
        boxes = boxes_xyxy / _pixel_scale(image_size.to(boxes_xyxy.dtype)).unsqueeze(-2)
        return boxes_to_signal(xyxy_to_cxcywh(boxes), self.signal_scale)

    def decode(self, x: Tensor, image_size: Tensor) -> Tensor:
        """Signal `(..., N, 4)` to pixel boxes: the inverse of `encode`, nothing clamped."""
        boxes = cxcywh_to_xyxy(signal_to_cxcywh(x, self.signal_scale))
        return boxes * _pixel_scale(image_size.to(x.dtype)).unsqueeze(-2)

    def proposals(self, x_t: Tensor, image_sizes: Tensor) -> Tensor:
        """Pixel boxes `(B, N, 4)` that enter a predictor: a clamped copy of `x_t`, inside the image."""
        return signal_to_boxes_xyxy(x_t, image_sizes, self.signal_scale)

    def endpoint(self, x_t: Tensor, answer: Tensor) -> Tensor:
        """`x_1_hat` `(B, N, 4)` signal, not clamped, of one raw answer `(B, N, 4)` at `x_t`."""
        answer = answer.to(x_t.dtype)
        return decode_endpoint(x_t, answer, signal_scale=self.signal_scale, box_weights=self.box_weights)

    def clamp(self, x_1: Tensor) -> Tensor:
        """An endpoint clamped to `[-s, s]`."""
        return x_1.clamp(-self.signal_scale, self.signal_scale)
