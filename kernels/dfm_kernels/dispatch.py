"""Which implementation of an op runs: the reference in plain torch, or the Triton kernel. Decided here alone.

"auto" takes Triton for CUDA tensors and the reference for the rest; "torch" is always the reference;
"triton" is the kernel, and an error where it cannot run. Under TRITON_INTERPRET=1
Triton's interpreter runs the kernels on CPU tensors, for tests. This module does not import torch, and an op
imports its kernel only once it is chosen: where there is no Triton, the reference must do without.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
# The package comes with torch's CUDA builds for Linux.
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None

# Of the process, not of a thread: activations that a backward makes again are made in autograd's threads.
_backend = "torch"


class BackendError(ValueError):
    """The backend that was asked for cannot run here; the message says why."""


def set_backend(name: str) -> None:
    """From now on all ops of the process run on `name`, one of BACKENDS; "torch" until this is called.

    Raises:
        ValueError: an unknown name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"the kernels' backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    _backend = name


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """As set_backend, until the `with` block ends."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; read by Triton once, when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(what: str, tensor: "Tensor", unsupported: str = "") -> bool:
    """Whether `what`, an op or something made of ops, runs as Triton kernels on tensors like `tensor`.

    Args:
        unsupported: why the kernel cannot take these arguments; empty: it can.

    Raises:
        BackendError: the backend is "triton", which cannot run; the message says why.
    """
    if _backend == "torch":
        return False
    if _backend == "auto":
        return tensor.is_cuda and not unsupported and TRITON_IS_INSTALLED
    if not TRITON_IS_INSTALLED:
        raise BackendError(f"{what}: the Triton kernel was asked for, but triton is not installed")
    if not (tensor.is_cuda or is_interpreted()):
        raise BackendError(
            f"{what}: the Triton kernel was asked for, but the tensors are on {tensor.device}: use the "
            "backend 'auto' or 'torch' there (TRITON_INTERPRET=1 interprets kernels on the CPU, for tests)"
        )
    if unsupported:
        raise BackendError(f"{what}: the Triton kernel was asked for, but {unsupported}")
    return True
