"""box_flow_update: its geometry and reference by hand, the Triton kernel against the reference."""

import math

import pytest
import torch
from dfm_kernels import BackendError, kernels
from dfm_kernels.box_flow_update import (
    aggregate,
    boxes_to_signal,
    decode_endpoint,
    euler_step,
    velocity_from_endpoint,
)
from dfm_kernels.box_flow_update import signal_to_boxes_xyxy as to_pixels
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import compare, flow_case, run

DECODE = {"signal_scale": 2.0, "box_weights": (2.0, 2.0, 1.0, 1.0)}


def test_zero_deltas_keep_a_box():
    torch.manual_seed(0)
    x_t = torch.rand(2, 6, 4, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(decode_endpoint(x_t, torch.zeros_like(x_t), **DECODE), x_t)


def test_deltas_mean_what_faster_rcnn_means():
    # A proposal of centre (0.5, 0.5) and size (0.2, 0.4), moved by half its width and doubled in height.
    x_t = boxes_to_signal(torch.tensor([[[0.5, 0.5, 0.2, 0.4]]]), 2.0)
    answer = torch.tensor([[[0.5 * 2.0, 0.0, 0.0, math.log(2.0)]]])
    x_1 = decode_endpoint(x_t, answer, **DECODE)
    torch.testing.assert_close(x_1, boxes_to_signal(torch.tensor([[[0.6, 0.5, 0.2, 0.8]]]), 2.0))


def test_decode_endpoint_gradcheck():
    torch.manual_seed(0)
    x_t = torch.randn(2, 3, 4, dtype=torch.float64)
    answer = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: decode_endpoint(x_t, a, **DECODE), answer)


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), size=st.tuples(*[st.integers(1, 2000)] * 2)
)
def test_pixel_boxes_are_inside_the_image_and_not_empty(values, size):
    x0, y0, x1, y1 = to_pixels(torch.tensor([[values]]), torch.tensor([size]), 2.0)[0, 0].tolist()
    assert 0 <= x0 < x1 <= size[1] * (1 + 1e-6) and 0 <= y0 < y1 <= size[0] * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_step_ends_exactly_and_never_divides_by_zero(dtype):
    x_t, x_1 = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype)
    one = torch.ones((), dtype=dtype)
    assert torch.equal(euler_step(x_t, x_1, torch.tensor(0.3, dtype=dtype), one), x_1)
    assert torch.equal(euler_step(x_t, x_1, one, one), x_1)
    half = euler_step(x_t, x_1, torch.tensor(0.5, dtype=dtype), torch.tensor(0.75, dtype=dtype))
    torch.testing.assert_close(half, (x_t + x_1) / 2)
    times = [torch.full(shape, 0.75, dtype=dtype) for shape in ((), (1,), (2,))]
    velocities = [velocity_from_endpoint(x_t, x_1, t) for t in times]
    assert all(torch.equal(velocity, 4 * (x_1 - x_t)) for velocity in velocities)
    assert not velocity_from_endpoint(x_t, x_1, one).any()


def test_aggregation_weights():
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 1, 4)
    probs = torch.tensor([[0.1, 0.2], [0.6, 0.1]]).view(2, 1, 1, 2)
    mean_x, mean_p = aggregate(x, probs.logit(), "uniform")
    torch.testing.assert_close(mean_x, torch.full((1, 1, 4), 0.5))
    torch.testing.assert_close(mean_p, torch.tensor([[[0.35, 0.15]]]))
    weighted_x, weighted_p = aggregate(x, probs.logit(), "confidence")
    torch.testing.assert_close(weighted_x, torch.full((1, 1, 4), 0.75))
    torch.testing.assert_close(weighted_p, torch.tensor([[[0.475, 0.125]]]))
    with pytest.raises(ValueError, match="aggregation must be"):
        aggregate(x, probs, "loudest")


@pytest.mark.parametrize("num_predictors", [1, 3, 12])
def test_the_reference_is_the_composition_of_its_parts(num_predictors):
    case = flow_case(d=num_predictors, seed=num_predictors)
    x_t, _, logits, t, t_next, sizes = case.tensors
    t_next[1] = 1.0
    update = case.function(*case.tensors)
    assert update.x_1_hat.abs().max() <= 2.0
    torch.testing.assert_close(update.x_next[1], update.x_1_hat[1])
    torch.testing.assert_close(update.velocity, (update.x_1_hat - x_t) / (1 - t)[:, None, None])
    torch.testing.assert_close(update.class_probs, logits.sigmoid().mean(0))
    torch.testing.assert_close(update.boxes_xyxy, to_pixels(update.x_next, sizes, 2.0))


def test_the_reference_of_no_proposals():
    update = run(flow_case(b=1, n=0), "torch")
    assert update["x_next"].shape == (1, 0, 4) and update["class_probs"].shape == (1, 0, 4)


# ------------------------------------------------------------------ the kernel


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter
def test_the_confidence_of_a_single_predictor_does_not_count(kernel_device):
    case = flow_case(kernel_device, d=1, aggregation="confidence")
    case.tensors[2][:] = -200.0  # probability 0
    compare(case)


@pytest.mark.parametrize("times", [(0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (1.0 - 2.0**-24, 1.0)])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_the_ends_of_time(kernel_device, times, shape):
    t, t_next = (torch.full(shape, t, device=kernel_device) for t in times)
    compare(flow_case(kernel_device, n=2).with_tensors(3, t, t_next))


def test_infinities_and_boxes_outside_the_image(kernel_device):
    case = flow_case(kernel_device, n=6)
    x_t, answers, logits = case.tensors[:3]
    x_t[0, :3] = torch.tensor([[9.0, -9.0, 3.0, -3.0], [50.0, 50.0, -50.0, 50.0], [0.0, 0.0, 0.0, 0.0]])
    answers[0, 0, 0] = torch.tensor([float("inf"), -float("inf"), float("inf"), -float("inf")])
    answers[1, 1, 2] = torch.tensor([float("nan"), 0.0, 1e30, -1e30])
    logits[0, 0, 1] = float("inf")
    compare(case)


def test_what_does_not_fit(kernel_device):
    update, (x_t, answers, logits, t, *others), *_ = flow_case(kernel_device)
    with pytest.raises(ValueError, match="must be .B, N, 4."):
        update(x_t[:, :2], answers, logits, t, *others)
    with kernels("triton"):
        with pytest.raises(BackendError, match="x_t is torch.float64"):
            update(x_t.double(), answers, logits, t, *others)
        with pytest.raises(BackendError, match="there is no predictor"):
            update(x_t, answers[:0], logits[:0], t, *others)
        with pytest.raises(ValueError, match="t must have shape"):
            update(x_t, answers, logits, t.repeat(2), *others)


def test_a_side_grows_by_a_bounded_factor():
    """As in Detectron2: at most 1000 / 16 times in one answer."""
    x_t = boxes_to_signal(torch.tensor([[[0.5, 0.5, 0.016, 0.016]]]), 2.0)
    grown = decode_endpoint(x_t, torch.tensor([[[0.0, 0.0, 99.0, 99.0]]]), **DECODE)
    expected = boxes_to_signal(torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]), 2.0)
    torch.testing.assert_close(grown, expected, rtol=1e-5, atol=1e-5)
