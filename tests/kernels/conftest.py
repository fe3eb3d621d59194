"""Triton kernels in tests: on a GPU where there is one, else interpreted (tests/conftest.py)."""

import pytest
import torch
from dfm_kernels import kernels
from kernel_cases import flow_case, run


@pytest.fixture(autouse=True)
def backend_and_precision_are_restored():
    """A detector sets the backend of the process when it is built. TF32 is allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with kernels("torch"):
        yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def kernel_device() -> str:
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    from triton.runtime.errors import InterpreterError

    try:  # a loop: with NumPy 2.4 the interpreters before 3.9 fail at any
        run(flow_case(), "triton")
    except InterpreterError:
        pytest.skip("the interpreter of this Triton does not work with this NumPy: install an older NumPy")
    return "cpu"


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
