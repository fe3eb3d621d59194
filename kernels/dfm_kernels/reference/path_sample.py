"""One point of the linear (conditional optimal transport) path.

Shapes: B images, N proposals; any leading and trailing dimensions in general.
"""

from torch import Tensor

from dfm_kernels.reference.box_flow_update import expand_t


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
