"""box_flow_update and sample_box_paths: the Triton kernels against their references."""

import os
import subprocess
import sys

import pytest
import torch
from dfm_kernels import reference
from dfm_kernels.dispatch import BackendError, use_triton
from dfm_kernels.ops import box_flow_update, sample_box_paths
from dfm_kernels.reference import philox_normal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

WEIGHTS = (2.0, 2.0, 1.0, 1.0)
# Signal is of order 1 and pixels of order 100: 2e-6 of either.
SIGNAL = {"rtol": 2e-6, "atol": 2e-6}
PIXELS = {"rtol": 2e-6, "atol": 2e-4}


def flow_arguments(device, b=2, n=5, d=3, k=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    sizes = torch.tensor([[48.0, 64.0], [100.0, 50.0], [33.0, 77.0]]).repeat(-(-b // 3), 1)[:b]
    arguments = (2 * normal(b, n, 4), normal(d, b, n, 4).to(dtype), 3 * normal(d, b, n, k).to(dtype))
    t = torch.rand(b, generator=generator)
    return [a.to(device) for a in (*arguments, t, t + (1 - t) / 2, sizes)]


def compare_flow(arguments, prediction="endpoint", aggregation="uniform", s=2.0):
    options = {
        "signal_scale": s,
        "box_weights": WEIGHTS,
        "prediction": prediction,
        "aggregation": aggregation,
    }
    expected = reference.box_flow_update(*arguments, **options)
    found = box_flow_update(*arguments, **options, backend="triton")
    for name, a, b in zip(expected._fields, found, expected):
        limits = PIXELS if name == "boxes_xyxy" else SIGNAL
        if name == "velocity":  # was divided by 1 - t, and so was its error
            remaining = (1 - arguments[3].float()).reshape(-1, 1, 1)
            a, b = a * remaining, b * remaining
        torch.testing.assert_close(a, b, **limits, equal_nan=True, msg=f"{name} is {a}, expected {b}")


@pytest.mark.parametrize("prediction", ["endpoint", "velocity"])
@pytest.mark.parametrize("aggregation", ["uniform", "confidence"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 5, 3, 4), (3, 33, 12, 2), (1, 300, 2, 80)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_box_flow_update_equals_its_reference(kernel_device, poisoned_memory, prediction, aggregation, shape):
    b, n, d, k = shape
    compare_flow(flow_arguments(kernel_device, b, n, d, k), prediction, aggregation)


def test_box_flow_update_of_one_predictor_ignores_its_confidence(kernel_device):
    arguments = flow_arguments(kernel_device, d=1)
    arguments[2][:] = -200.0  # probability 0
    compare_flow(arguments, aggregation="confidence")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_box_flow_update_takes_answers_of_half_precision(kernel_device, dtype):
    compare_flow(flow_arguments(kernel_device, dtype=dtype))


@pytest.mark.parametrize("times", [(0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (1.0 - 2.0**-24, 1.0)])
def test_box_flow_update_at_the_ends_of_time(kernel_device, times):
    arguments = flow_arguments(kernel_device)
    for prediction in ("endpoint", "velocity"):
        arguments[3], arguments[4] = (torch.tensor(t, device=kernel_device) for t in times)
        compare_flow(arguments, prediction)
        arguments[3], arguments[4] = (torch.full((2,), t, device=kernel_device) for t in times)
        compare_flow(arguments, prediction)


def test_box_flow_update_of_infinities_and_of_boxes_outside_the_image(kernel_device):
    arguments = flow_arguments(kernel_device, n=6)
    arguments[0][0, :3] = torch.tensor(
        [[9.0, -9.0, 3.0, -3.0], [50.0, 50.0, -50.0, 50.0], [0.0, 0.0, 0.0, 0.0]]
    )
    arguments[1][0, 0, 0] = torch.tensor([float("inf"), -float("inf"), float("inf"), -float("inf")])
    arguments[1][1, 1, 2] = torch.tensor([float("nan"), 0.0, 1e30, -1e30])
    arguments[2][0, 0, 1] = float("inf")
    compare_flow(arguments)


def test_box_flow_update_of_no_queries_and_of_strided_inputs(kernel_device):
    compare_flow(flow_arguments(kernel_device, n=0))
    arguments = flow_arguments(kernel_device, b=2, n=10, d=4, k=6)
    strided = [arguments[0][:, ::2], arguments[1][:, :, ::2], arguments[2][::2, :, 1::2]]
    strided[1] = strided[1][1:3]
    assert not any(a.is_contiguous() for a in strided)
    compare_flow([*strided, *arguments[3:]])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 9, 4, 7))),
    s=st.sampled_from([0.5, 2.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_box_flow_update_property(kernel_device, shape, s, seed):
    arguments = flow_arguments(kernel_device, *shape, seed=seed)
    compare_flow(arguments, s=s)
    found = box_flow_update(
        *arguments, signal_scale=s, box_weights=WEIGHTS, prediction="endpoint", aggregation="uniform",
        backend="triton",
    )  # fmt: skip
    height, width = arguments[5].unbind(1)
    limit = torch.stack([width, height, width, height], 1)[:, None]
    assert (found.boxes_xyxy >= 0).all() and (found.boxes_xyxy <= limit).all()
    assert (found.x_1_hat.abs() <= s * (1 + 1e-6)).all()


def test_box_flow_update_says_what_does_not_fit(kernel_device):
    options = {
        "signal_scale": 2.0, "box_weights": WEIGHTS, "prediction": "endpoint", "aggregation": "uniform",
    }  # fmt: skip
    arguments = flow_arguments(kernel_device)
    with pytest.raises(ValueError, match="must be .B, N, 4."):
        box_flow_update(arguments[0][:, :2], *arguments[1:], **options)
    with pytest.raises(BackendError, match="x_t is torch.float64"):
        box_flow_update(arguments[0].double(), *arguments[1:], **options, backend="triton")
    with pytest.raises(ValueError, match="t must have shape"):
        box_flow_update(*arguments[:3], arguments[3].repeat(2), *arguments[4:], **options, backend="triton")
    with pytest.raises(ValueError, match="auto, torch, triton, got 'cuda'"):
        box_flow_update(*arguments, **options, backend="cuda")


def path_arguments(device, b=3, n=7, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([[48.0, 64.0], [100.0, 50.0], [33.0, 77.0]])[:b]
    seeds = torch.tensor([1, -5, 2**40 + 3])[:b]
    x_1 = torch.randn(b, n, 4, generator=generator)
    t = torch.rand(d, b, generator=generator)
    if d > 1:
        t[0], t[-1] = 0.0, 1.0
    return [a.to(device) for a in (seeds, x_1, t, sizes)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 4), (2, 300, 12), (3, 0, 2)])
@pytest.mark.parametrize("offset", [0, 3, 2**35 + 9, -1])
def test_sample_box_paths_equals_its_reference(kernel_device, poisoned_memory, shape, offset):
    seed, x_1, t, sizes = path_arguments(kernel_device, *shape)
    expected = reference.sample_box_paths(seed, offset, x_1, t, sizes, signal_scale=2.0)
    on_device = torch.tensor(offset, device=kernel_device)
    found = sample_box_paths(seed, on_device, x_1, t, sizes, signal_scale=2.0, backend="triton")
    for name, a, b in zip(expected._fields, found, expected):
        limits = PIXELS if name == "boxes_xyxy" else SIGNAL
        torch.testing.assert_close(a, b, **limits, msg=f"{name} is {a}, expected {b}")


def test_sample_box_paths_reference_is_the_noise_and_the_path(kernel_device):
    seed, x_1, t, sizes = path_arguments("cpu")
    sample = sample_box_paths(seed, 2, x_1, t, sizes, signal_scale=2.0, backend="torch")
    assert torch.equal(sample.x_0, philox_normal(seed, 2, x_1.shape[1]))
    assert torch.equal(sample.x_t[0], sample.x_0) and torch.equal(sample.x_t[-1], x_1)
    with pytest.raises(ValueError, match="must be .B, N, 4."):
        sample_box_paths(seed[:2], 2, x_1, t, sizes, signal_scale=2.0)


def test_opcheck_box_flow_update_and_sample_box_paths(kernel_device):
    tests = ("test_schema", "test_faketensor")
    arguments = flow_arguments(kernel_device)
    options = (2.0, list(WEIGHTS), "endpoint", "confidence")
    torch.library.opcheck(torch.ops.dfm.box_flow_update.default, (*arguments, *options), test_utils=tests)
    seed, x_1, t, sizes = path_arguments(kernel_device)
    offset = torch.tensor(4, device=kernel_device)
    torch.library.opcheck(
        torch.ops.dfm.sample_box_paths.default, (seed, offset, x_1, t, sizes, 2.0), test_utils=tests
    )


def test_triton_where_it_cannot_run_is_an_error_and_auto_takes_the_reference():
    code = (
        "import torch; from dfm_kernels.dispatch import use_triton\n"
        "x = torch.zeros(1)\n"
        "assert not use_triton('op', 'auto', x) and not use_triton('op', 'torch', x)\n"
        "use_triton('op', 'triton', x)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "BackendError: op: the Triton kernel was asked for" in done.stderr
    assert not use_triton("op", "auto", torch.zeros(1), "reasons")
