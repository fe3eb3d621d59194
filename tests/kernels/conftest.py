"""Triton kernels in tests: on a GPU where there is one, else interpreted (tests/conftest.py)."""

import functools

import pytest
import torch


@pytest.fixture
def kernel_device() -> str:
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    if not interpreter_works():
        pytest.skip("the interpreter of this Triton does not work with this NumPy: install an older NumPy")
    return "cpu"


@functools.cache
def interpreter_works() -> bool:
    """Whether Triton's interpreter runs a loop at all: those before 3.9 fail with NumPy 2.4."""
    from kernel_probe import total
    from triton.runtime.errors import InterpreterError

    out = torch.zeros(1)
    try:
        total[(1,)](out, 3)
    except InterpreterError:
        return False
    assert out.item() == 3.0
    return True


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New memory is full of NaN: an element that a kernel forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like
    new_empty = torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
