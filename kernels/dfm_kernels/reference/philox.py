"""Counter-based random numbers: Philox-4x32-10 (Salmon et al., 2011) in integer torch arithmetic.

The same (seed, offset, index) gives the same number on every device, in every batch and in any order of
calls, which is what makes noise a function of (seed, iteration, image, block).
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10
# Smallest uniform that enters the logarithm of Box-Muller, so that it stays finite.
_SMALLEST = 1.0e-7


def philox_4x32(seed: Tensor, offset: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits for each element of the broadcast of seed, offset and index.

    Args:
        seed: int64, its low and high 32 bits are the key.
        offset: int64, its low and high 32 bits are counter words 2 and 3.
        index: int64, its low and high 32 bits are counter words 0 and 1.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32).
    """
    seed, offset, index = torch.broadcast_tensors(seed, offset, index)
    # Words live in the low half of int64: products wrap modulo 2^64, of which both halves are exact.
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = index & _MASK, (index >> 32) & _MASK
    c2, c3 = offset & _MASK, (offset >> 32) & _MASK
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def _to_uniform(word: Tensor) -> Tensor:
    """A 32-bit word to float32 in [0, 1), by the word's distance from zero as a signed integer."""
    signed = torch.where(word >= 2**31, word - 2**32, word)
    folded = torch.where(signed < 0, -signed - 1, signed)
    # The largest product rounds to exactly 1 in float32; keep the interval half open.
    return (folded.to(torch.float32) * 4.6566127342e-10).clamp_(max=1.0 - 2.0**-24)


def philox_uniform(seed: Tensor, offset: Tensor | int, index: Tensor | int = 0) -> Tensor:
    """Uniform float32 in [0, 1) for each element of the broadcast of the arguments (int64)."""
    offset = torch.as_tensor(offset, device=seed.device)
    index = torch.as_tensor(index, device=seed.device)
    return _to_uniform(philox_4x32(seed, offset, index)[0])


def philox_normal(seed: Tensor, offset: Tensor | int, count: int) -> Tensor:
    """Standard normals, four for each of `count` indices (Box-Muller on pairs of words).

    Args:
        seed: int64 of any shape `S`.
        offset: int64, broadcast against `S`; another offset is another stream.
        count: number of indices.

    Returns:
        float32 of shape `S + (count, 4)`.
    """
    offset = torch.as_tensor(offset, device=seed.device)
    index = torch.arange(count, device=seed.device)
    words = philox_4x32(seed.unsqueeze(-1), offset.unsqueeze(-1), index)
    u = [_to_uniform(w) for w in words]
    normals = []
    for u_1, u_2 in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(u_1.clamp(min=_SMALLEST)))
        normals += [radius * torch.cos(2 * math.pi * u_2), radius * torch.sin(2 * math.pi * u_2)]
    return torch.stack(normals, dim=-1)
