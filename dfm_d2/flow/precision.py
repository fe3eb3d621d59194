"""Where sums need more digits than the layers computed with."""

from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return x.float() if x.dtype.itemsize < 4 else x
