"""Triton kernels in tests: on a GPU where there is one, else interpreted (tests/conftest.py)."""

import pytest
import torch


@pytest.fixture
def kernel_device() -> str:
    pytest.importorskip("triton", reason="Triton is not installed")
    return "cuda" if torch.cuda.is_available() else "cpu"


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
