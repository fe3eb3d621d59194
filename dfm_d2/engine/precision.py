"""Which precision a step computes in."""

import contextlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for bfloat16, so that it is faster than float32, not slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    processors = Path("/proc/cpuinfo")  # not on every system
    flags = processors.read_text(encoding="utf-8", errors="replace") if processors.exists() else ""
    return re.search(r"\b(avx512|amx)_bf16\b", flags) is not None


def resolve_amp_dtype(enabled: bool, name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for plain float32.

    ``name`` is "auto" (bfloat16 where ``has_fast_bfloat16``), "bfloat16" or "float16" (CUDA only).
    Raises UserError for float16 on a CPU.
    """
    if not enabled:
        return None
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else None
    if name == "float16" and device.type != "cuda":
        raise UserError("SOLVER.AMP.DTYPE float16 needs a CUDA device; use auto or bfloat16 on a CPU.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def autocast_factory(device: torch.device, dtype: torch.dtype | None) -> Callable[[], AbstractContextManager]:
    """A function that makes a fresh autocast context each time it is called.

    Each block enters its own, because one context would keep every block's casted weights alive.
    """
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def inference_autocast(cfg: CfgNode) -> AbstractContextManager:
    """The autocast of ``SOLVER.AMP``, in which inference computes as training does; a new context."""
    device = torch.device(cfg.MODEL.DEVICE)
    return autocast_factory(device, resolve_amp_dtype(cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE, device))()
