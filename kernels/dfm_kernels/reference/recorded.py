"""Sizes as tensors, so that what is traced or exported holds for images of other sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def size_tensor(
    sizes: Sequence[int | Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """`torch.tensor(sizes)`; under torch.jit.trace it follows the shapes that `sizes` were read from.

    There a size is a tensor of no dimension, of which `torch.tensor` would keep the number alone.

    Args:
        sizes: numbers, or pairs of them.
    """
    if not torch.jit.is_tracing():
        return torch.tensor(sizes, device=device, dtype=dtype)
    rows = [
        torch.stack([torch.as_tensor(s) for s in row])
        if isinstance(row, (tuple, list, torch.Size))
        else torch.as_tensor(row)
        for row in sizes
    ]
    return torch.stack(rows).to(device=device, dtype=dtype)
