"""Embedding of the time t in [0, 1]. Shapes: B images, C channels."""

import math

import torch
from torch import Tensor, nn

# Times are spread over this range, so that the sinusoids of the usual periods resolve [0, 1].
_TIME_RANGE = 1000.0
_MAX_PERIOD = 10000.0


class TimeEmbedding(nn.Module):
    """Sinusoids of t (arXiv 1706.03762, section 3.5) through a two-layer perceptron.

    Args:
        dim: C, even.
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"time embedding needs an even dimension, got {dim}")
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """`t` `(B,)` to `(B, C)`."""
        half = self.dim // 2
        exponent = torch.arange(half, device=t.device, dtype=torch.float32) / half
        frequencies = torch.exp(-math.log(_MAX_PERIOD) * exponent)
        angles = _TIME_RANGE * t.to(torch.float32)[:, None] * frequencies
        weight = self.mlp[0].weight
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1).to(weight.dtype))
