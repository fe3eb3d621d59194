"""The update modes against each other: same gradients, same weights, less memory, errors before damage."""

import copy
from unittest import mock

import pytest
import torch
from toy_model import BATCH, make_toy, moved, train_steps

from dfm_d2.local_update import Leaves, LocallyTrainable, NonFiniteLossError, SavedActivations, sum_losses


def test_no_gradient_crosses_from_block_to_block_and_an_item_without_a_loss_is_refused():
    model = make_toy()
    assert isinstance(model, LocallyTrainable)
    items = model.block_losses(model.prepare(BATCH, 0), Leaves())
    next(items)
    sum_losses(next(items).losses).backward()
    for block, named in model.blocks().items():
        for name, parameter in named:
            assert (parameter.grad is not None) == (block == "predictor1"), name
    with pytest.raises(ValueError, match="No entry"):
        sum_losses({"accuracy": torch.tensor(1.0)})


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("update", ["sequential", "in backward"])
def test_sequential_equals_joint_after_adamw(clip, update):
    joint, local = make_toy(torch.float64), make_toy(torch.float64)
    _, metrics = train_steps(joint, "joint", steps=5, BLOCK_CLIP_NORM=clip)
    _, local_metrics = train_steps(local, update, steps=5, BLOCK_CLIP_NORM=clip)
    torch.testing.assert_close(local.state_dict(), joint.state_dict(), rtol=0, atol=1e-6)
    torch.testing.assert_close(local_metrics, metrics, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("update", ["joint", "sequential", "parallel"])
def test_bfloat16_autocast_trains_with_a_fresh_context_for_each_block(update):
    model, autocast = make_toy(), mock.Mock(side_effect=lambda: torch.autocast("cpu", torch.bfloat16))
    before = copy.deepcopy(model.state_dict())
    _, metrics = train_steps(model, update, autocast=autocast)
    if update == "sequential":
        assert autocast.call_count == 3 + 2  # the predictors, the shared block, and the end
    assert all(value.isfinite() for value in metrics.values())
    assert moved(model, before) == before.keys()


@pytest.mark.parametrize("update", ["sequential", "joint", "in backward"])
def test_activations_of_a_block_are_freed_before_the_next_starts_and_gradients_in_backward(update):
    model = make_toy(num_predictors=4)
    losses_of, alive, held = model.losses_of, [], []

    def looked(*arguments):
        alive.append(saved.alive)
        held.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return losses_of(*arguments)

    model.losses_of = looked
    with SavedActivations(model.parameters()) as saved:
        train_steps(model, update)
    assert len(alive) == 4 and saved.alive == 0
    assert alive == (sorted(set(alive)) if update == "joint" else [alive[0]] * 4)
    assert update != "in backward" or held == [0] * 4


def test_saved_tensors_are_counted_once_and_until_they_are_freed():
    x, weight = (torch.ones(1000, requires_grad=True) for _ in range(2))
    with SavedActivations([weight]) as saved:
        y = x * 2  # saves nothing of its own
        first = (y * y).sum()  # y, twice
        assert saved.alive == saved.peak == 4000
        second = (y.view(10, 100).exp() * weight.view(10, 100)).sum()  # the exponential; not the parameter
        assert saved.alive == 8000
        first.backward(retain_graph=True)
        first = None
        second.backward()
        second = None
        z = y.exp()
        assert saved.peak == 8000
    del y, z
    assert saved.alive == 0


@pytest.mark.parametrize("update", ["joint", "sequential", "in backward"])
def test_a_loss_that_is_not_finite_stops_before_the_offending_block(update):
    factor, changed = ("inf", {"predictors.0"}) if update == "in backward" else ("nan", set())
    model = make_toy()
    losses_of, before = model.losses_of, copy.deepcopy(model.state_dict())

    def poisoned(index, *rest):
        bad = float(factor) if index == 1 else 1.0
        return {k: v * bad if "loss" in k else v for k, v in losses_of(index, *rest).items()}

    model.losses_of = poisoned
    with pytest.raises(NonFiniteLossError, match=f"loss_square/predictor1 = {factor}") as caught:
        train_steps(model, update)
    assert caught.value.values.keys() == {"loss_square/predictor1", "loss_absolute/predictor1"}
    assert {name[: len("predictors.0")] for name in moved(model, before)} == changed


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = make_toy()
    model.predictors[2][0].weight.register_hook(lambda grad: grad * float("inf"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLossError, match="gradient of block predictor2"):
        train_steps(model, "sequential")
    assert not moved(model, before)
