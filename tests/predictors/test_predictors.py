"""Heads, stack, time embedding and pooling."""

import pytest
import torch

from dfm_d2.detection.head import FeaturePooler, FlowHead
from dfm_d2.detection.stack import PredictorStack
from dfm_d2.errors import UserError
from dfm_d2.flow import warped_grid, warped_time
from dfm_d2.flow.time_embedding import TimeEmbedding


def _head(interaction="dynamic_conv"):
    sizes = {"num_classes": 5, "dim": 16, "num_heads": 2, "feedforward_dim": 32, "dynamic_dim": 4}
    pooler = FeaturePooler((1 / 4, 1 / 8), 3, 2, 32.0)
    return FlowHead(pooler=pooler, interaction=interaction, num_cls=1, num_reg=2, **sizes)


def _inputs(num_images=2, num_proposals=6):
    torch.manual_seed(0)
    features = [torch.randn(num_images, 16, 12, 16), torch.randn(num_images, 16, 6, 8)]
    boxes = torch.rand(num_images, num_proposals, 4) * 20
    boxes[..., 2:] += boxes[..., :2] + 1
    return features, boxes, torch.randn(num_images, num_proposals, 4), torch.rand(num_images)


def test_an_unknown_interaction_is_refused():
    with pytest.raises(ValueError, match="'dynamic_conv' or 'grid_linear', got 'linear'"):
        _head("linear")


@pytest.mark.parametrize("interaction", ["dynamic_conv", "grid_linear"])
def test_a_head_answers_for_every_proposal_in_any_order(interaction):
    torch.manual_seed(1)
    head, (features, boxes, x_t, t) = _head(interaction), _inputs()
    answer = head(features, boxes, x_t, t)
    assert answer.class_logits.shape == (2, 6, 5) and answer.boxes.shape == (2, 6, 4)
    assert answer.class_logits.sigmoid().mean() < 0.05  # the prior of rare objects
    assert answer.boxes.abs().max() < 0.1  # and boxes that begin where they are
    order = torch.randperm(6)
    mixed = head(features, boxes[:, order], x_t[:, order], t)
    torch.testing.assert_close(mixed.class_logits, answer.class_logits[:, order], atol=1e-5, rtol=1e-4)


def test_time_and_place_reach_the_answer():
    head = _head()
    torch.nn.init.normal_(head.time_modulation[1].weight, std=0.1)  # it begins at zero
    features, boxes, x_t, t = _inputs()
    base = head(features, boxes, x_t, t).class_logits
    for changed in ((boxes, x_t, t * 0), (boxes, x_t + 1, t), (boxes + 5, x_t, t)):
        assert not torch.allclose(base, head(features, *changed).class_logits)
    one = head(features, boxes, x_t, t[:1].squeeze()).class_logits
    torch.testing.assert_close(one[0], base[0], atol=1e-5, rtol=1e-4)


def test_every_parameter_of_a_head_learns():
    head = _head()
    for layer in (head.box_answer, head.class_logits, head.time_modulation[1]):
        torch.nn.init.normal_(layer.weight, std=0.5)
    answer = head(*_inputs())
    (answer.class_logits.square().sum() + answer.boxes.square().sum()).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_time_embedding_tells_times_apart_and_needs_an_even_dimension():
    with pytest.raises(ValueError, match="even dimension, got 7"):
        TimeEmbedding(7)
    embedded = TimeEmbedding(32)(torch.linspace(0, 1, 11))
    assert torch.cdist(embedded, embedded).add(torch.eye(11)).min() > 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.5, 3.0, 9.0, 12.0])
@pytest.mark.parametrize("num_predictors", [1, 3, 4, 6, 7])
def test_a_chain_covers_the_unit_interval_once(num_predictors, rate):
    stack = PredictorStack(torch.nn.Identity, num_predictors, num_predictors, rate)
    grid = warped_grid(num_predictors, rate)
    for k in range(num_predictors):
        assert stack.answering(grid[k]) == [k]
        t = warped_time((k + torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64)) / num_predictors, rate)
        assert [stack.answering(float(x)) for x in t] == [[k]] * 3
        assert grid[k] - 1e-9 <= t.min() and t.max() < grid[k + 1]
    assert stack.answering(1.0) == [num_predictors - 1]


def test_the_members_of_an_interval_answer_or_those_chosen_and_rounding_may_fall_short():
    ensemble, pairs, chain = (PredictorStack(torch.nn.Identity, 6, intervals) for intervals in (1, 3, 6))
    assert ensemble.answering(0.9) == [0, 1, 2, 3, 4, 5] and ensemble.answering(0.9, [2, 0]) == [2, 0]
    assert chain.answering(3 * (1 / 6)) == [3] and chain.answering(0.8333333134651184) == [5]
    assert [pairs.answering(t) for t in (0.0, 0.34, 1.0)] == [[0, 1], [2, 3], [4, 5]]
    assert pairs.answering(0.5, [1]) == [3]
    with pytest.raises(UserError, match=r"MEMBERS names \[2\], an interval has 2"):
        pairs.answering(0.5, [0, 2])
