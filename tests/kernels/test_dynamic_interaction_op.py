"""dynamic_interaction: the Triton kernels against the reference and its autograd."""

import pytest
import torch
from dfm_kernels import reference
from dfm_kernels.dispatch import BackendError, is_interpreted
from dfm_kernels.ops import dynamic_interaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAMES = ("roi", "weight_in", "weight_out", "gain_in", "bias_in", "gain_out", "bias_out")


@pytest.fixture(autouse=True)
def tf32_is_allowed():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def tolerance(dtype):
    """Of an element, relative to the largest of its tensor or one: LayerNorms of few channels cancel."""
    if dtype == torch.float32 and is_interpreted():
        return 2e-5
    return {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]


def arguments_of(device, m=3, cells=9, c=20, h=6, sets=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((m, cells, c), (m, c, h), (m, h, c), (sets, h), (sets, h), (sets, c), (sets, c))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[1], tensors[2] = tensors[1] / c**0.5, tensors[2] / h**0.5
    tensors[3], tensors[5] = tensors[3] + 1, tensors[5] + 1
    tensors[:3] = [x.to(dtype) for x in tensors[:3]]
    return [x.to(device).requires_grad_() for x in tensors]


def run(function, tensors, **options):
    """The answer and the seven gradients of a weighted sum of it."""
    mixed = function(*tensors[:3], tuple(tensors[3:5]), tuple(tensors[5:7]), **options)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(mixed.shape, generator=generator).to(mixed)
    return [mixed, *torch.autograd.grad(mixed, tensors, weight)]


def compare(tensors):
    limit = tolerance(tensors[0].dtype)
    # In float64: LayerNorms of few channels cost the reference in float32 as many digits as the kernel.
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = run(reference.dynamic_interaction, wide)
    found = run(dynamic_interaction, tensors, backend="triton")
    for name, ours, theirs, given_tensor in zip(("mixed", *NAMES), found, expected, (tensors[0], *tensors)):
        assert ours.dtype == given_tensor.dtype and ours.shape == theirs.shape, name
        scale = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(
            ours.double(), theirs, rtol=0, atol=limit * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 9, 20, 6), (2, 49, 256, 64), (2, 25, 128, 32), (5, 64, 33, 17)]
)
def test_dynamic_interaction_and_its_gradients_equal_the_reference(kernel_device, poisoned_memory, shape):
    compare(arguments_of(kernel_device, *shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dynamic_interaction_of_half_precision(kernel_device, dtype):
    if dtype == torch.bfloat16 and is_interpreted():
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    compare(arguments_of(kernel_device, 2, 25, 40, 16, dtype=dtype))


@pytest.mark.parametrize("sets", [2, 12])
def test_dynamic_interaction_of_several_predictors(kernel_device, sets):
    compare(arguments_of(kernel_device, m=12, cells=4, c=8, h=4, sets=sets))


def test_dynamic_interaction_of_several_predictors_is_that_of_each(kernel_device):
    tensors = [x.detach() for x in arguments_of(kernel_device, m=6, sets=2)]
    norms = tensors[3:]
    together = reference.dynamic_interaction(*tensors[:3], tuple(norms[:2]), tuple(norms[2:]))
    alone = [
        reference.dynamic_interaction(
            *(x[3 * d : 3 * d + 3] for x in tensors[:3]),
            tuple(x[d] for x in norms[:2]),
            tuple(x[d] for x in norms[2:]),
        )
        for d in range(2)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_dynamic_interaction_under_vmap_is_that_of_each(kernel_device):
    tensors = [x.detach().unflatten(0, (2, -1)) for x in arguments_of(kernel_device, m=6, sets=2)]
    tensors = [x.requires_grad_() for x in tensors]

    def interact(*x, backend="triton"):
        return dynamic_interaction(*x[:3], x[3:5], x[5:], backend=backend)

    together = torch.vmap(interact)(*tensors)
    alone = torch.stack([interact(*(x[d] for x in tensors), backend="torch") for d in range(2)])
    limit = tolerance(torch.float32) * float(alone.detach().abs().max())
    torch.testing.assert_close(together, alone, rtol=0, atol=limit)
    found, expected = (torch.autograd.grad(x.square().sum(), tensors) for x in (together, alone))
    for ours, theirs in zip(found, expected):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * tolerance(torch.float32) * scale)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(interact)(*tensors), alone, rtol=0, atol=limit)


def test_dynamic_interaction_of_strided_inputs(kernel_device):
    tensors = [x.detach() for x in arguments_of(kernel_device)]
    tensors[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:3]]
    compare([x.requires_grad_() for x in tensors])


def test_dynamic_interaction_of_no_queries(kernel_device):
    compare(arguments_of(kernel_device, m=0))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 3), cells=st.integers(1, 20), c=st.integers(2, 40), h=st.integers(2, 40),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_dynamic_interaction_property(kernel_device, m, cells, c, h, seed):
    compare(arguments_of(kernel_device, m, cells, c, h, seed=seed))


def test_dynamic_interaction_is_deterministic_and_saves_statistics_only_for_a_backward(kernel_device):
    tensors = arguments_of(kernel_device)
    first, second = (run(dynamic_interaction, tensors, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        with torch.no_grad():
            dynamic_interaction(*tensors[:3], tensors[3:5], tensors[5:], backend="triton")
        assert not saved
        dynamic_interaction(*tensors[:3], tensors[3:5], tensors[5:], backend="triton")
        # Its inputs and four numbers a cell; the reference keeps five more grids.
        assert sum(saved) == sum(x.numel() for x in tensors) + 4 * tensors[0].shape[0] * tensors[0].shape[1]


def test_dynamic_interaction_cannot_be_differentiated_twice(kernel_device):
    tensors = arguments_of(kernel_device)
    mixed = dynamic_interaction(*tensors[:3], tensors[3:5], tensors[5:], backend="triton")
    (gradient,) = torch.autograd.grad(mixed.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.sum().backward()


def test_dynamic_interaction_says_what_does_not_fit(kernel_device):
    tensors = arguments_of(kernel_device)
    norms = (tuple(tensors[3:5]), tuple(tensors[5:]))
    with pytest.raises(ValueError, match="must be .M, P.2, C., .M, C, H. and .M, H, C."):
        dynamic_interaction(tensors[0], tensors[2], tensors[1], *norms)
    with pytest.raises(BackendError, match="torch.float64"):
        dynamic_interaction(*(x.double() for x in tensors[:3]), *norms, backend="triton")
    wide = arguments_of(kernel_device, cells=81)
    with pytest.raises(BackendError, match="P.2 = 81, C = 20, H = 6 do not fit"):
        dynamic_interaction(*wide[:3], *norms, backend="triton")
    two = arguments_of(kernel_device, m=3, sets=2)
    with pytest.raises(ValueError, match="norms of 2 predictors"):
        dynamic_interaction(*two[:3], tuple(two[3:5]), tuple(two[5:]))


@pytest.mark.gpu
def test_dynamic_interaction_refuses_exact_float32(kernel_device):
    torch.set_float32_matmul_precision("highest")
    tensors = arguments_of(kernel_device)
    with pytest.raises(BackendError, match="TF32"):
        dynamic_interaction(*tensors[:3], tensors[3:5], tensors[5:], backend="triton")


def test_opcheck_dynamic_interaction(kernel_device):
    torch.library.opcheck(
        torch.ops.dfm.dynamic_interaction.default,
        (*arguments_of(kernel_device), True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
