"""The references: values by hand, torchvision's answers, and gradients against finite differences."""

import math

import pytest
import torch
from dfm_kernels.box_flow_update import (
    aggregate,
    boxes_to_signal,
    decode_endpoint,
    euler_step,
)
from dfm_kernels.box_flow_update import signal_to_boxes_xyxy as to_pixels
from dfm_kernels.flow_loss import flow_loss, paired_giou, pairwise_giou
from dfm_kernels.multilevel_roi_align import assign_levels, multilevel_roi_align
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LOSS, flow_case, interaction_case, loss_case, pool_case
from torchvision.ops import generalized_box_iou, roi_align

DECODE = {"signal_scale": 2.0, "box_weights": (2.0, 2.0, 1.0, 1.0)}
POOL = {"c": 2, "levels": 2, "size": (32, 32)}
POOL["at"] = torch.tensor([[[1.0, 2.0, 9.0, 8.0], [-4.0, 3.0, 40.0, 30.0]]]).expand(2, 2, 4)
BOX_LOSSES = loss_case(n=4, k=3)
BOX_LOSSES = BOX_LOSSES._replace(function=lambda *x, f=BOX_LOSSES.function: f(*x)[1:])
# A case and which of its tensors learn.
GRADCHECKS = {
    "box_flow_update": (flow_case(n=2), [1, 2]),
    # The quality target is a constant of the class loss: finite differences must not see it move.
    "class loss": (loss_case(n=4, k=3), [0]),
    "box losses": (BOX_LOSSES, [1]),
    "adaptive roi_align": (pool_case(samples=0, **POOL), [0, 1]),
    "roi_align": (pool_case(samples=2, **POOL), [0, 1]),
    "dynamic_interaction": (interaction_case(m=2, cells=4, c=3, h=5), range(7)),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    case, learning = GRADCHECKS[name]
    tensors = [x.detach().double() if x.is_floating_point() else x for x in case.tensors]
    for i in learning:
        tensors[i].requires_grad_()
    assert torch.autograd.gradcheck(case.function, tensors)


def test_deltas_mean_what_faster_rcnn_means():
    x_t = torch.rand(2, 6, 4, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(decode_endpoint(x_t, torch.zeros_like(x_t), **DECODE), x_t)
    for before, answer, after in (
        # Moved by half its width and doubled in height; then as in Detectron2 by at most 1000 / 16 times.
        ((0.5, 0.5, 0.2, 0.4), (0.5 * 2.0, 0.0, 0.0, math.log(2.0)), (0.6, 0.5, 0.2, 0.8)),
        ((0.5, 0.5, 0.016, 0.016), (0.0, 0.0, 99.0, 99.0), (0.5, 0.5, 1.0, 1.0)),
    ):
        before, answer, after = (torch.tensor([[box]]) for box in (before, answer, after))
        x_1 = decode_endpoint(boxes_to_signal(before, 2.0), answer, **DECODE)
        torch.testing.assert_close(x_1, boxes_to_signal(after, 2.0), rtol=1e-5, atol=1e-5)


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), size=st.tuples(*[st.integers(1, 2000)] * 2)
)
def test_pixel_boxes_are_inside_the_image_and_not_empty(values, size):
    x0, y0, x1, y1 = to_pixels(torch.tensor([[values]]), torch.tensor([size]), 2.0)[0, 0].tolist()
    assert 0 <= x0 < x1 <= size[1] * (1 + 1e-6) and 0 <= y0 < y1 <= size[0] * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_step_ends_exactly_and_never_divides_by_zero(dtype):
    x_t, x_1 = torch.randn(2, 2, 3, 4, dtype=dtype)
    one, *times = (torch.tensor(t, dtype=dtype) for t in (1.0, 0.3, 0.5, 0.75))
    assert torch.equal(euler_step(x_t, x_1, times[0], one), x_1)
    assert torch.equal(euler_step(x_t, x_1, one, one), x_1)
    torch.testing.assert_close(euler_step(x_t, x_1, *times[1:]), (x_t + x_1) / 2)
    for shape in ((), (1,), (2,)):
        t, t_next = (torch.full(shape, value, dtype=dtype) for value in (0.5, 0.75))
        assert torch.equal(euler_step(x_t, x_1, t, t_next), x_t + 0.5 * (x_1 - x_t))


def test_aggregation_is_the_mean():
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 1, 4)
    probs = torch.tensor([[0.1, 0.2], [0.6, 0.1]]).view(2, 1, 1, 2)
    found = aggregate(x, probs.logit())
    torch.testing.assert_close(found, (torch.full((1, 1, 4), 0.5), torch.tensor([[[0.35, 0.15]]])))


@pytest.mark.parametrize("num_predictors", [1, 3, 12])
def test_box_flow_update_is_the_composition_of_its_parts(num_predictors):
    case = flow_case(d=num_predictors, seed=num_predictors)
    x_t, _, logits, t, t_next, sizes = case.tensors
    t_next[1] = 1.0
    update = case.function(*case.tensors)
    assert update.x_1_hat.abs().max() <= 2.0
    torch.testing.assert_close(update.x_next[1], update.x_1_hat[1])
    torch.testing.assert_close(update.class_probs, logits.sigmoid().mean(0))
    torch.testing.assert_close(update.boxes_xyxy, to_pixels(update.x_next, sizes, 2.0))


def test_giou_against_torchvision():
    torch.manual_seed(0)
    a, b = torch.rand(7, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    torch.testing.assert_close(pairwise_giou(a, b)[1], generalized_box_iou(a, b))
    torch.testing.assert_close(paired_giou(a[:5], b)[1], generalized_box_iou(a[:5], b).diagonal())


def test_flow_loss_by_hand_and_its_bounds():
    x_1 = boxes_to_signal(torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]]), 2.0)
    x_1_hat = boxes_to_signal(torch.tensor([[[0.6, 0.5, 0.2, 0.2], [9.0, 9.0, 9.0, 9.0]]]), 2.0)
    classes = torch.tensor([[0, 1]])  # the second query is background: its box must not count
    arguments = torch.zeros(1, 2, 1), x_1_hat, classes, x_1, torch.ones(()), torch.tensor(1.0)
    loss = flow_loss(*arguments, **LOSS)
    # Intersection 0.1 x 0.2, union 0.06, hull equal to the union.
    cls = ((1 / 3 - 0.5) ** 2 + 0.5**2) * math.log(2)
    expected = (cls, 0.1, 1 - 1 / 3, 25 * 0.4**2)
    torch.testing.assert_close(torch.stack(loss), torch.tensor(expected))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), samples=st.sampled_from([0, 2]), levels=st.integers(1, 4))
def test_multilevel_roi_align_is_roi_align_of_the_chosen_level(seed, samples, levels):
    generator = torch.Generator().manual_seed(seed)
    scales = [1 / 4 / 2**i for i in range(levels)]
    features = [torch.randn(2, 3, 32 // 2**i, 32 // 2**i, generator=generator) for i in range(levels)]
    boxes = torch.rand(2, 5, 4, generator=generator) * 128
    boxes[..., 2:] += boxes[..., :2]
    boxes[0, 0, 2], boxes[0, 1, 2:] = boxes[0, 0, 0], boxes[0, 1, :2]  # boxes without extent
    out = multilevel_roi_align(features, boxes, scales, 3, samples, canonical_size=56.0)
    level = assign_levels(boxes.flatten(0, 1), levels, 2, 56.0)
    assert samples > 0 or not out[:2].any()
    for row, chosen in enumerate(level.tolist()):
        roi = torch.cat([torch.tensor([row // 5]), boxes.flatten(0, 1)[row]])[None]
        expected = roi_align(features[chosen], roi, 3, scales[chosen], samples, aligned=True)
        torch.testing.assert_close(out[row], expected[0])


def test_dynamic_interaction_of_several_predictors_is_that_of_each():
    interact, tensors, *_ = interaction_case(m=6, sets=2)
    alone = []
    for d in range(2):
        matrices = [x[3 * d : 3 * d + 3] for x in tensors[:3]]
        alone.append(interact(*matrices, *(x[d] for x in tensors[3:])))
    torch.testing.assert_close(interact(*tensors), torch.cat(alone), rtol=1e-5, atol=1e-5)
