"""Noise as a function of a key, never of call order, batch or rank.

A key names everything that a draw depends on, for example (seed, iteration, image id, block).
"""

import hashlib
from collections.abc import Sequence

import torch
from dfm_kernels.reference import philox_normal, philox_uniform
from torch import Tensor

# Streams of one key: another use of a key draws from another stream.
STREAM_NOISE = 0
STREAM_TIME = 1
STREAM_BACKGROUND = 2
STREAM_PERMUTATION = 3
STREAM_POLICY = 5
STREAM_STAGE_TIME = 7
STREAM_NEGATIVE = 8
# That of block d of a stochastic classifier is this + d.
STREAM_COPIES = 64


def stream_key(*parts: int | str) -> int:
    """A signed 64-bit key of the parts, equal on every machine and in every process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def keyed_normal(keys: Sequence[int], count: int, stream: int = STREAM_NOISE, device=None) -> Tensor:
    """Standard normals `(len(keys), count, 4)` float32: row i depends on `keys[i]` and `stream` alone."""
    return philox_normal(torch.tensor(keys, dtype=torch.int64, device=device), stream, count)


def keyed_uniform(keys: Sequence[int], count: int, stream: int = STREAM_TIME, device=None) -> Tensor:
    """Uniforms `(len(keys), count)` float32 in [0, 1)."""
    seed = torch.tensor(keys, dtype=torch.int64, device=device)
    return philox_uniform(seed[:, None], stream, torch.arange(count, device=device))
