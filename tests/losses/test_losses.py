"""Coupling, assignment and the loss of one block."""

import math

import pytest
import torch
from dfm_kernels.box_flow_update import boxes_to_signal
from hypothesis import given, settings
from hypothesis import strategies as st

from dfm_d2.detection.assignment import DynamicK, assigned_targets
from dfm_d2.detection.coupling import GroundTruth, build_slots, couple
from dfm_d2.detection.loss import BlockLoss
from dfm_d2.flow import BoxSpace, keyed_normal

SCALE, K = 2.0, 3
SPACE = BoxSpace(SCALE)
COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=3)  # of boxes, image by image
ASSIGNER = DynamicK(BlockLoss(SCALE))


def _ground_truth(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_1, classes = [], []
    for count in counts:
        low = torch.rand(count, 2, generator=generator) * 0.6
        size = 0.05 + torch.rand(count, 2, generator=generator) * 0.35
        x_1.append(SPACE.encode(torch.cat([low, low + size], 1), torch.ones(2)))
        classes.append(torch.randint(K, (count,), generator=generator))
    return GroundTruth.pad(x_1, classes)


@given(counts=COUNTS, num_slots=st.integers(1, 10), repeat=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_slots_hold_each_box_at_most_repeat_times(counts, num_slots, repeat):
    gt = _ground_truth(counts)
    slots = build_slots(gt, num_slots, repeat, list(range(len(counts))), SCALE)
    assert slots.x_1.shape == (len(counts), num_slots, 4) and slots.x_1.abs().max() <= SCALE
    for i, count in enumerate(counts):
        index = slots.gt_index[i]
        filled = index[index >= 0]
        assert len(filled) == min(count * repeat, num_slots)
        if count:
            frequency = torch.bincount(filled, minlength=count)
            assert frequency.max() <= repeat and frequency.max() - frequency.min() <= 1
        torch.testing.assert_close(slots.x_1[i, index >= 0], gt.x_1[i, filled])


def test_coupling_permutes_and_transport_is_optimal():
    gt, keys = _ground_truth([3, 0]), [7, 8]
    slots = build_slots(gt, 6, 1, keys, SCALE)
    x_0 = keyed_normal(keys, 6)
    costs = {}
    for method in ("optimal_transport", "independent"):
        coupled = couple(x_0, slots, method, keys)
        for i in range(2):
            assert sorted(coupled.x_1[i].tolist()) == sorted(slots.x_1[i].tolist())
            assert sorted(coupled.gt_index[i].tolist()) == sorted(slots.gt_index[i].tolist())
            rows = coupled.gt_index[i] >= 0
            torch.testing.assert_close(coupled.x_1[i, rows], gt.x_1[i, coupled.gt_index[i, rows]])
        costs[method] = (x_0 - coupled.x_1).square().sum((1, 2))
    assert (costs["optimal_transport"] < costs["independent"]).all()
    # Independent of the noise.
    other = couple(keyed_normal([1, 2], 6), slots, "independent", keys)
    assert torch.equal(other.gt_index, coupled.gt_index)
    with pytest.raises(ValueError, match="'optimal_transport' or 'independent', got 'ot'"):
        couple(x_0, slots, "ot", keys)
    swapped = couple(x_0, slots, "optimal_transport", keys).x_1
    for a in range(6):
        for b in range(a):
            other = swapped.clone()
            other[:, [a, b]] = other[:, [b, a]]
            assert ((x_0 - other).square().sum((1, 2)) >= costs["optimal_transport"] - 1e-4).all()


@given(counts=COUNTS, num_queries=st.integers(1, 12), seed=st.integers(0, 1000), with_logits=st.booleans())
@settings(deadline=None, max_examples=100)
def test_dynamic_k_serves_every_box_while_queries_last(counts, num_queries, seed, with_logits):
    gt = _ground_truth(counts, seed)
    x = keyed_normal(list(range(len(counts))), num_queries)
    logits = torch.randn(len(counts), num_queries, K) if with_logits else None
    index = ASSIGNER(gt, x, logits)
    assert index.shape == (len(counts), num_queries)
    for i, count in enumerate(counts):
        found = index[i][index[i] >= 0].unique()
        assert len(found) == min(count, len(found)) and (found < max(count, 1)).all()
        assert len(found) >= min(count, num_queries) if count <= num_queries else (index[i] >= 0).all()
        if count == 0:
            assert (index[i] == -1).all()


def test_dynamic_k_prefers_the_query_on_the_box_and_survives_nan():
    gt = _ground_truth([2, 1])
    x = keyed_normal([1, 2], 6) * 0.1 - 1.5
    x[0, 2], x[0, 4], x[1, 5] = gt.x_1[0, 0], gt.x_1[0, 1], gt.x_1[1, 0]
    x[1, 0] = float("nan")
    index = ASSIGNER(gt, x, torch.zeros(2, 6, K))
    assert index[0, 2] == 0 and index[0, 4] == 1 and index[1, 5] == 0 and index[1, 0] == -1


def test_dynamic_k_gives_a_well_found_box_more_queries():
    gt = _ground_truth([1])
    x = gt.x_1[:, :1].expand(1, 8, 4).clone()
    assert (ASSIGNER(gt, x) == 0).sum() == 5
    assert (ASSIGNER(gt, x[:, :3]) == 0).sum() == 3
    x[:, 1:] = -SCALE
    assert (ASSIGNER(gt, x) == 0).tolist() == [[True] + [False] * 7]


def test_batch_of_two_is_two_batches_of_one():
    gt = _ground_truth([4, 2])
    x, logits = keyed_normal([1, 2], 7), torch.randn(2, 7, K)
    both = ASSIGNER(gt, x, logits)
    for i in range(2):
        one = GroundTruth(*(part[i : i + 1] for part in gt))
        assert torch.equal(ASSIGNER(one, x[i : i + 1], logits[i : i + 1])[0], both[i])


def test_assigned_targets_of_background_is_class_k():
    gt = _ground_truth([2])
    classes, x_1 = assigned_targets(gt, torch.tensor([[1, -1, 0]]), K)
    assert classes.tolist() == [[gt.classes[0, 1], K, gt.classes[0, 0]]]
    torch.testing.assert_close(x_1[0, 0], gt.x_1[0, 1])


def test_block_loss_without_any_object_trains_classes_only_and_leaves_out_terms_of_weight_zero():
    logits, x = torch.zeros(1, 4, K, requires_grad=True), torch.zeros(1, 4, 4, requires_grad=True)
    arguments = logits, x, torch.full((1, 4), K), torch.zeros(1, 4, 4), torch.zeros(1)
    loss = BlockLoss(SCALE, velocity_weight=1.0)(*arguments)
    assert loss["l1"] == loss["giou"] == loss["velocity"] == 0 and loss["cls"] > 0
    sum(loss.values()).backward()
    assert logits.grad.abs().sum() > 0 and torch.equal(x.grad, torch.zeros_like(x))
    assert set(BlockLoss(SCALE, l1_weight=0.0)(*arguments)) == {"cls", "giou"}


def _one_box(num_boxes=1):
    x_1 = boxes_to_signal(torch.tensor([[0.5, 0.5, 0.4, 0.4]]).expand(num_boxes, 4), SCALE)
    return GroundTruth.pad([x_1], [torch.zeros(num_boxes, dtype=torch.int64)])


@pytest.mark.parametrize(("lower", "higher"), [(0.01, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 0.99)])
def test_of_two_equal_boxes_the_more_probable_is_assigned(lower, higher):
    # Both overlap the object by less than a half, so that it takes one query.
    x = boxes_to_signal(torch.tensor([[[0.5, 0.5, 0.2, 0.2]] * 2]), SCALE)
    probs = torch.tensor([[[lower, 0.99], [higher, 0.5]]])  # the second class is not the object's
    assert ASSIGNER(_one_box(), x, probs.logit()).tolist() == [[-1, 0]]


def test_of_more_boxes_than_slots_a_random_subset_gets_one():
    gt = _one_box(12)
    subsets = [build_slots(gt, 4, 1, [key], SCALE).gt_index[0].tolist() for key in range(6)]
    assert all(len(set(subset)) == 4 for subset in subsets)
    assert len({tuple(sorted(subset)) for subset in subsets}) > 1
    assert subsets[0] == build_slots(gt, 4, 1, [0], SCALE).gt_index[0].tolist()
    assert build_slots(_one_box(4), 4, 1, [0], SCALE).gt_index[0].tolist() == [0, 1, 2, 3]  # room for all


@pytest.mark.parametrize("num_objects", [1, 2])
def test_block_loss_is_a_mean_over_the_queries_with_an_object(num_objects):
    target = boxes_to_signal(torch.tensor([[[0.5, 0.5, 0.2, 0.2]] * 3]), SCALE)
    x_1_hat = boxes_to_signal(torch.tensor([[[0.6, 0.5, 0.2, 0.2]] * 3]), SCALE)
    classes = torch.tensor([[0] * num_objects + [1] * (3 - num_objects)])
    loss = BlockLoss(SCALE)(torch.zeros(1, 3, 1), x_1_hat, classes, target, torch.zeros(()))
    assert float(loss["l1"]) == pytest.approx(5 * 0.1, rel=1e-4)
    assert float(loss["giou"]) == pytest.approx(2 * (1 - 1 / 3), rel=1e-4)
    quality_focal = math.log(2) * ((1 / 3 - 0.5) ** 2 * num_objects + 0.5**2 * (3 - num_objects))
    assert float(loss["cls"]) == pytest.approx(2 * quality_focal / num_objects, rel=1e-4)


def test_background_boxes_lie_around_the_middle():
    gt = GroundTruth.pad([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)])
    slots = build_slots(gt, 4000, 1, [0], SCALE)
    assert (slots.gt_index == -1).all()
    torch.testing.assert_close(slots.x_1.std(), torch.tensor(SCALE / 3), rtol=0.03, atol=0)


def test_costs_by_hand():
    """`5 L1 - 2 GIoU`, 100 more where the centre lies outside of the box, and twice the focal loss."""
    gt, probs = _one_box(), torch.tensor([[[0.5], [0.1]]])
    x = boxes_to_signal(torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.9, 0.5, 0.2, 0.2]]]), SCALE)
    cost, iou = ASSIGNER._cost(gt, x, None)
    torch.testing.assert_close(iou[0, :, 0], torch.tensor([0.25, 0.0]))
    # The second: boxes of 0.16 and 0.04 that do not meet, in a hull of 0.7 by 0.4.
    expected = [5 * 0.4 - 2 * 0.25, 5 * 0.8 + 2 * (0.28 - 0.2) / 0.28 + 100]
    torch.testing.assert_close(cost[0, :, 0], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    x = x[:, :1].expand(1, 2, 4)
    of_classes = ASSIGNER._cost(gt, x, probs.logit())[0] - ASSIGNER._cost(gt, x, None)[0]
    expected = [2 * (-0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)) for p in (0.5, 0.1)]
    torch.testing.assert_close(of_classes[0, :, 0], torch.tensor(expected), rtol=0, atol=1e-5)
