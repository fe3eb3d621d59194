"""Noise as a function of a key, never of call order, batch or rank.

A key names everything that a draw depends on, for example (seed, iteration, image id, block). From it and a
stream the counter-based Philox-4x32-10 (Salmon et al., 2011), in integer torch arithmetic, makes the same
numbers on every device, in every batch and in any order of calls.
"""

import hashlib
import math
from collections.abc import Sequence

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

# Streams of one key: another use of a key draws from another stream.
STREAM_NOISE = 0
STREAM_TIME = 1
STREAM_BACKGROUND = 2
STREAM_PERMUTATION = 3
STREAM_STATE = 5
STREAM_STAGE_TIME = 7
STREAM_NEGATIVE = 8


def stream_key(*parts: int | str) -> int:
    """A signed 64-bit key of the parts, equal on every machine and in every process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def keyed_normal(keys: Sequence[int], count: int, stream: int = STREAM_NOISE, device=None) -> Tensor:
    """Standard normals `(len(keys), count, 4)` float32: row i depends on `keys[i]` and `stream` alone."""
    u = [_to_uniform(word) for word in _words(keys, count, stream, device)]
    normals = []
    for u_1, u_2 in ((u[0], u[1]), (u[2], u[3])):  # Box-Muller
        radius = torch.sqrt(-2.0 * torch.log(u_1.clamp(min=_SMALLEST)))
        normals += [radius * torch.cos(2 * math.pi * u_2), radius * torch.sin(2 * math.pi * u_2)]
    return torch.stack(normals, dim=-1)


def keyed_uniform(keys: Sequence[int], count: int, stream: int = STREAM_TIME, device=None) -> Tensor:
    """Uniforms `(len(keys), count)` float32 in [0, 1)."""
    return _to_uniform(_words(keys, count, stream, device)[0])


def _words(keys: Sequence[int], count: int, stream: int, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seed = torch.tensor(keys, dtype=torch.int64, device=device)[:, None]
    return philox_4x32(seed, torch.as_tensor(stream, device=device), torch.arange(count, device=device))


def philox_4x32(seed: Tensor, offset: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits for each element of the broadcast of seed, offset and index.

    Args (int64, of each the low and the high 32 bits):
        seed: the key. offset: counter words 2 and 3. index: counter words 0 and 1.

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
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def _to_uniform(word: Tensor) -> Tensor:
    """A 32-bit word to float32 in [0, 1), by the word's distance from zero as a signed integer."""
    signed = torch.where(word >= 2**31, word - 2**32, word)
    folded = torch.where(signed < 0, -signed - 1, signed)
    # The largest product rounds to exactly 1 in float32; keep the interval half open.
    return (folded.to(torch.float32) * 4.6566127342e-10).clamp_(max=1.0 - 2.0**-24)
