"""Coupling, assignment and the loss of one block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfm_d2.detection.assignment import DynamicK, assigned_targets
from dfm_d2.detection.coupling import build_slots, couple
from dfm_d2.detection.ground_truth import GroundTruth
from dfm_d2.detection.loss import BlockLoss
from dfm_d2.flow import BoxSpace, keyed_normal

SCALE, K = 2.0, 3
SPACE = BoxSpace(SCALE)


def _ground_truth(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_1, classes = [], []
    for count in counts:
        low = torch.rand(count, 2, generator=generator) * 0.6
        size = 0.05 + torch.rand(count, 2, generator=generator) * 0.35
        x_1.append(SPACE.encode(torch.cat([low, low + size], 1), torch.ones(2)))
        classes.append(torch.randint(K, (count,), generator=generator))
    return GroundTruth.pad(x_1, classes)


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    num_slots=st.integers(1, 10),
    repeat=st.integers(1, 4),
)
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
    gt = _ground_truth([3, 0])
    keys = [7, 8]
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
    swapped = couple(x_0, slots, "optimal_transport", keys).x_1
    for a in range(6):
        for b in range(a):
            other = swapped.clone()
            other[:, [a, b]] = other[:, [b, a]]
            assert ((x_0 - other).square().sum((1, 2)) >= costs["optimal_transport"] - 1e-4).all()


def test_independent_coupling_ignores_the_noise():
    gt = _ground_truth([2])
    slots = build_slots(gt, 5, 1, [3], SCALE)
    one = couple(keyed_normal([1], 5), slots, "independent", [3])
    two = couple(keyed_normal([2], 5), slots, "independent", [3])
    assert torch.equal(one.gt_index, two.gt_index)
    with pytest.raises(ValueError, match="coupling must be one of"):
        couple(keyed_normal([1], 5), slots, "nearest", [3])


@given(
    counts=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    num_queries=st.integers(1, 12),
    seed=st.integers(0, 1000),
    with_logits=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_dynamic_k_serves_every_box_while_queries_last(counts, num_queries, seed, with_logits):
    gt = _ground_truth(counts, seed)
    x = keyed_normal(list(range(len(counts))), num_queries)
    logits = torch.randn(len(counts), num_queries, K) if with_logits else None
    index = DynamicK(SCALE)(gt, x, logits)
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
    index = DynamicK(SCALE)(gt, x, torch.zeros(2, 6, K))
    assert index[0, 2] == 0 and index[0, 4] == 1 and index[1, 5] == 0 and index[1, 0] == -1


def test_dynamic_k_gives_a_well_found_box_more_queries():
    gt = _ground_truth([1])
    x = gt.x_1[:, :1].expand(1, 8, 4).clone()
    assert (DynamicK(SCALE)(gt, x) == 0).sum() == 5
    assert (DynamicK(SCALE)(gt, x[:, :3]) == 0).sum() == 3
    x[:, 1:] = -SCALE
    assert (DynamicK(SCALE)(gt, x) == 0).tolist() == [[True] + [False] * 7]


def test_batch_of_two_is_two_batches_of_one():
    gt = _ground_truth([4, 2])
    x, logits = keyed_normal([1, 2], 7), torch.randn(2, 7, K)
    both = DynamicK(SCALE)(gt, x, logits)
    for i in range(2):
        one = GroundTruth(*(part[i : i + 1] for part in gt))
        assert torch.equal(DynamicK(SCALE)(one, x[i : i + 1], logits[i : i + 1])[0], both[i])


def test_assigned_targets_of_background_is_class_k():
    gt = _ground_truth([2])
    classes, x_1 = assigned_targets(gt, torch.tensor([[1, -1, 0]]), K)
    assert classes.tolist() == [[gt.classes[0, 1], K, gt.classes[0, 0]]]
    torch.testing.assert_close(x_1[0, 0], gt.x_1[0, 1])


def test_block_loss_without_any_object_trains_classes_only():
    logits = torch.zeros(1, 4, K, requires_grad=True)
    x = torch.zeros(1, 4, 4, requires_grad=True)
    loss = BlockLoss(SCALE, velocity_weight=1.0)(
        logits, x, torch.full((1, 4), K), torch.zeros(1, 4, 4), torch.zeros(1)
    )
    assert loss["l1"] == loss["giou"] == loss["velocity"] == 0 and loss["cls"] > 0
    sum(loss.values()).backward()
    assert logits.grad.abs().sum() > 0 and torch.equal(x.grad, torch.zeros_like(x))


def test_block_loss_leaves_out_terms_of_weight_zero():
    args = (torch.zeros(1, 1, K), torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64))
    loss = BlockLoss(SCALE, l1_weight=0.0)(*args, torch.zeros(1, 1, 4), torch.zeros(()))
    assert set(loss) == {"cls", "giou"}
