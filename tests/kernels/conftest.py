"""Triton kernels in tests: on a GPU where there is one, else interpreted (tests/conftest.py)."""

import functools

import pytest
import torch
from dfm_kernels import kernels
from kernel_cases import flow_case, run


@pytest.fixture(autouse=True)
def backend_is_restored():
    """A detector sets the backend of the process when it is built."""
    with kernels("torch"):
        yield


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
    from triton.runtime.errors import InterpreterError

    try:
        run(flow_case(), "triton")
    except InterpreterError:
        return False
    return True


@pytest.fixture
def tf32_is_allowed():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New memory is full of NaN: an element that a kernel forgets to write shows."""

    def poisoned(make):
        def poison(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poison

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
