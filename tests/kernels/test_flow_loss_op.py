"""flow_loss: the Triton kernel and the gradients that it writes, against the reference and its autograd."""

import pytest
import torch
from dfm_kernels import reference
from dfm_kernels.dispatch import BackendError
from dfm_kernels.ops import flow_loss
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

OPTIONS = {"signal_scale": 2.0, "alpha": 0.25, "gamma": 2.0, "velocity_max": 25.0}
KINDS = ("focal", "quality_focal")
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-4},
}


def arguments_of(device, b=2, n=5, k=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_1_hat, target = (torch.randn(b, n, 4, generator=generator) for _ in range(2))
    target = 0.3 * target + 0.7 * x_1_hat  # boxes that overlap, partly
    classes = torch.randint(0, k + 1, (b, n), generator=generator)
    logits = (3 * torch.randn(b, n, k, generator=generator)).to(dtype)
    t = torch.rand(b, generator=generator)
    normalizer = (classes < k).sum().clamp(min=1).float()
    return [a.to(device) for a in (logits, x_1_hat, classes, target, t, normalizer)]


def run(function, arguments, **options):
    """The four terms and the gradients of a sum of them with four different weights."""
    logits, x_1_hat = (a.detach().clone().requires_grad_() for a in arguments[:2])
    terms = function(logits, x_1_hat, *arguments[2:], **(OPTIONS | options))
    weights = torch.tensor([2.0, 5.0, 3.0, 0.5], device=logits.device)
    sum(weight * term for weight, term in zip(weights, terms)).backward()
    return dict(
        zip(("cls", "l1", "giou", "velocity", "d_logits", "d_boxes"), (*terms, logits.grad, x_1_hat.grad))
    )


def compare(arguments, **options):
    expected = run(reference.flow_loss, arguments, **options)
    found = run(flow_loss, arguments, **options, backend="triton")
    for name, value in expected.items():
        limits = TOLERANCE[arguments[0].dtype if name == "d_logits" else torch.float32]
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, **limits, msg=f"{name}: {found[name]} for {value}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 4), (3, 33, 20), (1, 20, 131)])
def test_flow_loss_and_its_gradients_equal_the_reference(kernel_device, poisoned_memory, kind, shape):
    compare(arguments_of(kernel_device, *shape), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flow_loss_takes_logits_of_half_precision(kernel_device, kind, dtype):
    compare(arguments_of(kernel_device, dtype=dtype), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 3.0])
def test_flow_loss_of_other_exponents(kernel_device, kind, gamma):
    compare(arguments_of(kernel_device), kind=kind, gamma=gamma)


@pytest.mark.parametrize("kind", KINDS)
def test_flow_loss_at_its_limits(kernel_device, kind):
    arguments = arguments_of(kernel_device, b=1, n=6, k=3)
    logits, x_1_hat, classes, target, t, _ = arguments
    classes[:] = torch.tensor([[0, 1, 2, 3, 3, 0]])
    logits[0, 0] = torch.tensor([80.0, -80.0, 0.0])  # saturated, right and wrong
    logits[0, 1] = torch.tensor([80.0, -80.0, 0.0])
    x_1_hat[0, 2] = torch.tensor([5.0, 5.0, -1.0, -1.0])  # far from its target
    x_1_hat[0, 5, 2:] = -3.0  # negative sides
    t[:] = 1.0
    compare(arguments, kind=kind)
    arguments[2][:] = 3  # background only
    compare(arguments, kind=kind)


def test_flow_loss_of_no_queries(kernel_device):
    compare(arguments_of(kernel_device, n=0), kind="focal")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 9, 9))),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_flow_loss_property(kernel_device, shape, kind, seed):
    compare(arguments_of(kernel_device, *shape, seed=seed), kind=kind, signal_scale=1.0 + seed % 3)


def test_flow_loss_is_deterministic_writes_no_gradients_unasked_and_only_once(kernel_device):
    arguments = arguments_of(kernel_device, b=4, n=50, k=7)
    first, second = (run(flow_loss, arguments, kind="focal", backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        flow_loss(*arguments, **OPTIONS, kind="focal", backend="triton")
        assert sum(saved) == 0
        logits = arguments[0].clone().requires_grad_()
        terms = flow_loss(logits, *arguments[1:], **OPTIONS, kind="focal", backend="triton")
        assert sum(saved) == logits.numel() + 3 * arguments[1].numel()
    (gradient,) = torch.autograd.grad(terms.cls, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_flow_loss_says_what_does_not_fit(kernel_device):
    arguments = arguments_of(kernel_device)
    with pytest.raises(ValueError, match="'focal' or 'quality_focal', got 'hinge'"):
        flow_loss(*arguments, **OPTIONS, kind="hinge")
    with pytest.raises(BackendError, match="boxes are torch.float64"):
        flow_loss(
            arguments[0], arguments[1].double(), *arguments[2:], **OPTIONS, kind="focal", backend="triton"
        )
    with pytest.raises(ValueError, match="must be .B, N, K."):
        flow_loss(arguments[0], arguments[1][:1], *arguments[2:], **OPTIONS, kind="focal", backend="triton")


def test_opcheck_flow_loss(kernel_device):
    arguments = (*arguments_of(kernel_device), 2.0, "focal", 0.25, 2.0, 25.0)
    for gradients in (False, True):
        torch.library.opcheck(
            torch.ops.dfm.flow_loss.default,
            (*arguments, gradients),
            test_utils=("test_schema", "test_faketensor"),
        )
