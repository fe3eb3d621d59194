"""The references of the kernels: values, limits and gradients."""

import math

import pytest
import torch
from dfm_kernels.reference import (
    aggregate,
    assign_levels,
    box_flow_update,
    boxes_to_signal,
    decode_endpoint,
    dynamic_interaction,
    euler_step,
    flow_loss,
    multilevel_roi_align,
    paired_giou,
    pairwise_giou,
    path_sample,
    philox_4x32,
    philox_normal,
    philox_uniform,
    signal_to_boxes_xyxy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import generalized_box_iou, roi_align

WEIGHTS = (2.0, 2.0, 1.0, 1.0)
FLOW = {"signal_scale": 2.0, "box_weights": WEIGHTS, "prediction": "endpoint", "aggregation": "uniform"}


def test_philox_known_answers():
    # The published vectors of Random123 for philox4x32-10: counter, key -> words.
    cases = [
        ((0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((-1, -1, -1), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88 - 2**64),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for (seed, offset, index), words in cases:
        found = philox_4x32(torch.tensor(seed), torch.tensor(offset), torch.tensor(index))
        assert tuple(int(word) for word in found) == words


def test_philox_draws_have_the_right_moments_and_depend_on_seed_and_offset():
    seed = torch.tensor([1, 2])
    normals = philox_normal(seed, 0, 20000)
    assert normals.shape == (2, 20000, 4)
    assert normals.mean().abs() < 0.01 and (normals.std() - 1).abs() < 0.01
    assert torch.isfinite(normals).all()
    correlation = torch.corrcoef(torch.stack([normals[0].flatten(), normals[1].flatten()]))[0, 1]
    assert correlation.abs() < 0.02
    assert not torch.equal(philox_normal(seed, 1, 10), normals[:, :10])
    assert torch.equal(philox_normal(seed[1:], 0, 7)[0], normals[1, :7])
    uniform = philox_uniform(seed[:, None], 0, torch.arange(5000))
    assert 0 <= uniform.min() and uniform.max() < 1 and (uniform.mean() - 0.5).abs() < 0.01


def test_path_sample_is_exact_at_both_ends():
    x_0, x_1 = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    assert torch.equal(path_sample(x_0, x_1, torch.zeros(3))[0], x_0)
    assert torch.equal(path_sample(x_0, x_1, torch.ones(()))[0], x_1)


def test_t_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"t must have shape \(\) or \(3,\)"):
        path_sample(torch.zeros(3, 5, 4), torch.zeros(3, 5, 4), torch.zeros(2))


def test_zero_deltas_keep_a_box_and_velocity_reaches_its_endpoint():
    torch.manual_seed(0)
    x_t = torch.rand(2, 6, 4, dtype=torch.float64) * 2 - 1
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    kept = decode_endpoint(
        x_t, torch.zeros_like(x_t), t, signal_scale=2.0, box_weights=WEIGHTS, prediction="endpoint"
    )
    torch.testing.assert_close(kept, x_t)
    x_1 = torch.randn_like(x_t)
    velocity = (x_1 - x_t) / (1 - t)[:, None, None]
    reached = decode_endpoint(x_t, velocity, t, signal_scale=2.0, box_weights=WEIGHTS, prediction="velocity")
    torch.testing.assert_close(reached, x_1)


def test_deltas_mean_what_faster_rcnn_means():
    # A proposal of centre (0.5, 0.5) and size (0.2, 0.4), moved by half its width and doubled in height.
    x_t = boxes_to_signal(torch.tensor([[[0.5, 0.5, 0.2, 0.4]]]), 2.0)
    answer = torch.tensor([[[0.5 * 2.0, 0.0, 0.0, math.log(2.0)]]])
    x_1 = decode_endpoint(
        x_t, answer, torch.zeros(()), signal_scale=2.0, box_weights=WEIGHTS, prediction="endpoint"
    )
    torch.testing.assert_close(x_1, boxes_to_signal(torch.tensor([[[0.6, 0.5, 0.2, 0.8]]]), 2.0))


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4),
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
)
def test_pixel_boxes_are_inside_the_image_and_not_empty(values, height, width):
    x = torch.tensor(values)[None, None]
    box = signal_to_boxes_xyxy(x, torch.tensor([[height, width]]), 2.0)[0, 0]
    x0, y0, x1, y1 = box.tolist()
    assert 0 <= x0 < x1 <= width * (1 + 1e-6) and 0 <= y0 < y1 <= height * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_step_ends_exactly_and_never_divides_by_zero(dtype):
    x_t, x_1 = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype)
    one = torch.ones((), dtype=dtype)
    assert torch.equal(euler_step(x_t, x_1, torch.tensor(0.3, dtype=dtype), one), x_1)
    assert torch.equal(euler_step(x_t, x_1, one, one), x_1)
    half = euler_step(x_t, x_1, torch.tensor(0.5, dtype=dtype), torch.tensor(0.75, dtype=dtype))
    torch.testing.assert_close(half, (x_t + x_1) / 2)


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
def test_box_flow_update_is_the_composition_of_its_parts(num_predictors):
    torch.manual_seed(num_predictors)
    x_t, sizes = torch.randn(2, 5, 4), torch.tensor([[60, 90], [64, 64]])
    answers, logits = torch.randn(num_predictors, 2, 5, 4), torch.randn(num_predictors, 2, 5, 3)
    t, t_next = torch.tensor([0.25, 0.5]), torch.tensor([0.5, 1.0])
    update = box_flow_update(x_t, answers, logits, t, t_next, sizes, **FLOW)
    assert update.x_1_hat.abs().max() <= 2.0
    torch.testing.assert_close(update.x_next[1], update.x_1_hat[1])
    torch.testing.assert_close(update.velocity, (update.x_1_hat - x_t) / (1 - t)[:, None, None])
    torch.testing.assert_close(update.class_probs, logits.sigmoid().mean(0))
    torch.testing.assert_close(update.boxes_xyxy, signal_to_boxes_xyxy(update.x_next, sizes, 2.0))


def test_no_proposals_at_all():
    empty = torch.zeros(1, 0, 4)
    update = box_flow_update(
        empty, empty[None], torch.zeros(1, 1, 0, 3), torch.zeros(1), torch.ones(1), torch.ones(1, 2), **FLOW
    )
    assert update.x_next.shape == (1, 0, 4) and update.class_probs.shape == (1, 0, 3)


def test_giou_against_torchvision():
    torch.manual_seed(0)
    a, b = torch.rand(7, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    torch.testing.assert_close(pairwise_giou(a, b)[1], generalized_box_iou(a, b))
    torch.testing.assert_close(paired_giou(a[:5], b)[1], generalized_box_iou(a[:5], b).diagonal())


@pytest.mark.parametrize("kind", ["focal", "quality_focal"])
def test_flow_loss_gradcheck(kind):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    x_1 = torch.rand(2, 4, 4, dtype=torch.float64) - 0.5
    x_1_hat = (x_1 + 0.3 * torch.rand_like(x_1)).requires_grad_()
    classes = torch.tensor([[0, 1, 3, 2], [3, 3, 0, 1]])
    t, normalizer = torch.tensor([0.2, 0.95], dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)

    def loss(logits, x_1_hat):
        # The quality target is a constant of the loss: finite differences must not see it move.
        source = x_1_hat if kind == "focal" else x_1_hat.detach() * 0 + x_1_hat
        return tuple(
            flow_loss(
                logits, source, classes, x_1, t, normalizer,
                signal_scale=2.0, kind=kind, alpha=0.25, gamma=2.0, velocity_max=25.0,
            )
        )  # fmt: skip

    if kind == "focal":
        assert torch.autograd.gradcheck(loss, (logits, x_1_hat))
    else:
        assert torch.autograd.gradcheck(lambda z: loss(z, x_1_hat.detach())[0], (logits,))


def test_flow_loss_by_hand_and_its_bounds():
    logits = torch.zeros(1, 2, 1)
    x_1 = boxes_to_signal(torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]]), 2.0)
    x_1_hat = boxes_to_signal(torch.tensor([[[0.6, 0.5, 0.2, 0.2], [9.0, 9.0, 9.0, 9.0]]]), 2.0)
    classes = torch.tensor([[0, 1]])  # the second query is background: its box must not count
    options = {"signal_scale": 2.0, "kind": "focal", "alpha": 0.25, "gamma": 2.0, "velocity_max": 25.0}
    loss = flow_loss(logits, x_1_hat, classes, x_1, torch.ones(()), torch.tensor(1.0), **options)
    torch.testing.assert_close(loss.l1, torch.tensor(0.1))
    # Intersection 0.1 x 0.2, union 0.06, hull equal to the union.
    torch.testing.assert_close(loss.giou, torch.tensor(1 - 1 / 3))
    torch.testing.assert_close(loss.velocity, torch.tensor(25 * 0.4**2))
    torch.testing.assert_close(loss.cls, torch.tensor(0.25 * math.log(2) * (0.25 + 0.75)))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), sampling_ratio=st.sampled_from([0, 2]), levels=st.integers(1, 4))
def test_roi_align_of_levels_is_roi_align_of_the_chosen_level(seed, sampling_ratio, levels):
    generator = torch.Generator().manual_seed(seed)
    scales = [1 / 4 / 2**i for i in range(levels)]
    features = [torch.randn(2, 3, 32 // 2**i, 32 // 2**i, generator=generator) for i in range(levels)]
    boxes = torch.rand(2, 5, 4, generator=generator) * 128
    boxes[..., 2:] += boxes[..., :2]
    out = multilevel_roi_align(features, boxes, scales, 3, sampling_ratio, canonical_size=56.0)
    level = assign_levels(boxes.flatten(0, 1), levels, 2, 56.0)
    for row in range(10):
        roi = torch.cat([torch.tensor([row // 5]), boxes.flatten(0, 1)[row]])[None]
        chosen = int(level[row])
        expected = roi_align(features[chosen], roi, 3, scales[chosen], sampling_ratio, aligned=True)
        torch.testing.assert_close(out[row], expected[0])


def test_adaptive_roi_align_of_a_box_without_extent_is_zero():
    feature = torch.randn(1, 2, 8, 8)
    boxes = torch.tensor([[[5.0, 5.0, 5.0, 9.0], [3.0, 3.0, 3.0, 3.0]]])
    ours = multilevel_roi_align([feature], boxes, [0.25], 3, 0)
    assert torch.equal(ours, roi_align(feature, [boxes[0]], 3, 0.25, 0, aligned=True))
    assert not ours.any()


def test_roi_align_refuses_unequal_lists():
    with pytest.raises(ValueError, match="1 feature levels but 2 scales"):
        multilevel_roi_align([torch.zeros(1, 1, 4, 4)], torch.zeros(1, 1, 4), (0.25, 0.125), 2, 2)


def test_dynamic_interaction_gradcheck():
    torch.manual_seed(0)
    shapes = [(2, 4, 3), (2, 3, 5), (2, 5, 3)]
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    norms = [(torch.rand(c, dtype=torch.float64) + 0.5, torch.randn(c, dtype=torch.float64)) for c in (5, 3)]
    assert torch.autograd.gradcheck(lambda *xs: dynamic_interaction(*xs, *norms), tensors)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_gradcheck(sampling_ratio):
    torch.manual_seed(0)
    features = [
        torch.randn(2, 2, 8 // 2**i, 8 // 2**i, dtype=torch.float64, requires_grad=True) for i in range(2)
    ]
    boxes = torch.tensor([[[1.0, 2.0, 20.0, 13.0], [-4.0, 3.0, 40.0, 30.0]]]).expand(2, 2, 4)

    def pool(*features):
        return multilevel_roi_align(features, boxes, (0.25, 0.125), 2, sampling_ratio, 16.0)

    assert torch.autograd.gradcheck(pool, features)


@pytest.mark.parametrize("prediction", ["endpoint", "velocity"])
def test_decode_endpoint_gradcheck(prediction):
    torch.manual_seed(0)
    x_t, t = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0.0, 0.7], dtype=torch.float64)
    answer = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    options = {"signal_scale": 2.0, "box_weights": (2.0, 2.0, 1.0, 1.0), "prediction": prediction}
    assert torch.autograd.gradcheck(lambda a: decode_endpoint(x_t, a, t, **options), answer)
