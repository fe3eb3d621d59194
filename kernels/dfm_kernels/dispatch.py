"""Which implementation of an op runs: the reference in plain torch, or the Triton kernel.

"auto" takes Triton for CUDA tensors and the reference for the rest; "torch" is always the reference;
"triton" is the kernel, and an error where it cannot run. Under TRITON_INTERPRET=1
Triton's interpreter runs the kernels on CPU tensors, for tests.
"""

import functools
import importlib.util
import os

from torch import Tensor

BACKENDS = ("auto", "torch", "triton")


class BackendError(ValueError):
    """The backend that was asked for cannot run here; the message says why."""


@functools.cache
def triton_is_installed() -> bool:
    """Whether the package triton is there (it comes with torch's CUDA builds for Linux)."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; read by Triton once, when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(op: str, backend: str, tensor: Tensor, unsupported: str = "") -> bool:
    """Whether `op` runs as a Triton kernel on tensors like `tensor`.

    Args:
        unsupported: why the kernel cannot take these arguments; empty: it can.

    Raises:
        ValueError: an unknown backend.
        BackendError: "triton" was asked for and cannot run; the sentence says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"the kernels' backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        return False
    if backend == "auto":
        return tensor.is_cuda and not unsupported and triton_is_installed()
    if not triton_is_installed():
        raise BackendError(f"{op}: the Triton kernel was asked for, but triton is not installed")
    if not (tensor.is_cuda or is_interpreted()):
        raise BackendError(
            f"{op}: the Triton kernel was asked for, but the tensors are on {tensor.device}: use the backend "
            "'auto' or 'torch' there (TRITON_INTERPRET=1 interprets kernels on the CPU, for tests)"
        )
    if unsupported:
        raise BackendError(f"{op}: the Triton kernel was asked for, but {unsupported}")
    return True
