"""The linear (conditional optimal transport) path of flow matching (arXiv 2210.02747, eq. 22).

Shapes: B samples; any trailing dimensions.
"""

from typing import NamedTuple

import torch
from dfm_kernels.box_flow_update import expand_t
from torch import Tensor


class PathSample(NamedTuple):
    """One point of a path.

    x_0: noise `(B, ...)`. x_1: data `(B, ...)`. t: `()` or `(B,)`.
    x_t: `(1 - t) x_0 + t x_1`. dx_t: `x_1 - x_0`, the conditional velocity.
    """

    x_0: Tensor
    x_1: Tensor
    t: Tensor
    x_t: Tensor
    dx_t: Tensor


class CondOTPath:
    """`x_t = (1 - t) x_0 + t x_1`, from noise at t = 0 to data at t = 1."""

    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """The point of the path at `t`.

        Args:
            x_0, x_1: `(B, ...)`, one shape and one floating dtype.
            t: `()` or `(B,)`, in [0, 1].

        Raises:
            ValueError: shapes or dtypes do not agree, or `t` has another shape.
        """
        if x_0.shape != x_1.shape or x_0.dtype != x_1.dtype:
            found = [f"{tuple(x.shape)} {x.dtype}" for x in (x_0, x_1)]
            raise ValueError(f"x_0 and x_1 must agree, got {' and '.join(found)}")
        t = torch.as_tensor(t, dtype=x_1.dtype, device=x_1.device)
        share = expand_t(t, x_1)
        x_t = (1 - share) * x_0 + share * x_1  # at t = 0 and t = 1 exactly x_0 and x_1
        return PathSample(x_0=x_0, x_1=x_1, t=t, x_t=x_t, dx_t=x_1 - x_0)
