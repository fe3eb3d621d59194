"""The update modes against each other: same gradients, same weights, less memory, errors before damage."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from toy_model import ToyModel, toy_config, toy_item

from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.local_update import Leaves, LocallyTrainable, NonFiniteLossError, build_update, sum_losses

BATCH = [toy_item(position) for position in range(4)]


def make_model(dtype=torch.float32, **arguments) -> ToyModel:
    torch.manual_seed(0)
    return ToyModel(**arguments).to(dtype)


def run(model, update, steps=1, autocast=contextlib.nullcontext, **solver):
    """Step ``model`` with ``update`` on the toy batch; returns the optimizer and the last metrics."""
    optimizer = build_block_optimizer(toy_config(**solver), model)
    for iteration in range(steps):
        metrics = update.step(model, model.prepare(BATCH, iteration), optimizer, autocast)
    return optimizer, metrics


def test_the_toy_follows_the_protocol():
    assert isinstance(make_model(), LocallyTrainable)


def test_no_gradient_crosses_from_block_to_block():
    model = make_model()
    prepared = model.prepare(BATCH, 0)
    items = model.block_losses(prepared, Leaves())
    next(items)
    sum_losses(next(items).losses).backward()
    for block, named in model.blocks().items():
        for name, parameter in named:
            assert (parameter.grad is not None) == (block == "predictor1"), name


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("step_in_backward", [False, True])
def test_sequential_equals_joint_after_adamw(clip, step_in_backward):
    joint, local = make_model(torch.float64), make_model(torch.float64)
    _, metrics = run(joint, build_update("joint"), 5, BLOCK_CLIP_NORM=clip)
    update = build_update("sequential", step_in_backward)
    _, local_metrics = run(local, update, 5, BLOCK_CLIP_NORM=clip)
    assert metrics.keys() == local_metrics.keys()
    for (name, a), b in zip(joint.state_dict().items(), local.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    for key in metrics:
        torch.testing.assert_close(metrics[key], local_metrics[key], rtol=1e-6, atol=1e-9)


def test_gradients_agree_in_float32():
    joint, local = make_model(), make_model()
    run(joint, build_update("joint"), BLOCK_CLIP_NORM=0.0)
    run(local, build_update("sequential"), BLOCK_CLIP_NORM=0.0)
    for (block, named), twins in zip(joint.blocks().items(), local.blocks().values()):
        a = torch.cat([parameter.grad.flatten() for _, parameter in named])
        b = torch.cat([parameter.grad.flatten() for _, parameter in twins])
        assert (a - b).norm() <= 1e-5 * a.norm(), block


def test_sgd_agrees_in_float32():
    joint, local = make_model(), make_model()
    run(joint, build_update("joint"), 3, OPTIMIZER="sgd")
    run(local, build_update("sequential", True), 3, OPTIMIZER="sgd")
    for (name, a), b in zip(joint.state_dict().items(), local.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["joint", "sequential", "parallel"])
def test_bfloat16_autocast_trains(name):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    _, metrics = run(model, build_update(name), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert all(value.isfinite() for value in metrics.values())
    assert all(not torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_fresh_autocast_context_for_each_block():
    entered = []

    def autocast():
        entered.append(1)
        return contextlib.nullcontext()

    run(make_model(num_predictors=3), build_update("sequential"), autocast=autocast)
    assert len(entered) == 3 + 2  # the predictors, the shared block, and the end


class SavedCounter:
    """Counts the tensors that autograd holds for backward."""

    def __init__(self) -> None:
        self.alive = weakref.WeakSet()

    def pack(self, tensor):
        holder = _Holder(tensor.detach())
        self.alive.add(holder)
        return holder

    @staticmethod
    def unpack(holder):
        return holder.tensor

    def count(self) -> int:
        gc.collect()
        return len(self.alive)


class _Holder:
    def __init__(self, tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(("name", "freed"), [("sequential", True), ("joint", False)])
def test_activations_of_a_block_are_freed_before_the_next_starts(name, freed):
    model, counter, counts = make_model(num_predictors=4), SavedCounter(), []
    losses_of = model.losses_of

    def counted(index, features, prepared):
        counts.append(counter.count())
        return losses_of(index, features, prepared)

    model.losses_of = counted
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
        run(model, build_update(name))
    assert len(counts) == 4
    assert (counts == [counts[0]] * 4) == freed, counts
    if not freed:
        assert counts == sorted(counts) and counts[-1] > counts[0]


def test_step_in_backward_frees_gradients_before_the_next_block():
    model, held = make_model(), []
    losses_of = model.losses_of

    def counted(index, features, prepared):
        held.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return losses_of(index, features, prepared)

    model.losses_of = counted
    run(model, build_update("sequential", True))
    assert held == [0, 0, 0]


@pytest.mark.parametrize("name", ["joint", "sequential"])
def test_a_non_finite_loss_changes_nothing(name):
    model = make_model()
    losses_of = model.losses_of

    def poisoned(index, features, prepared):
        losses = losses_of(index, features, prepared)
        return losses | (
            {"loss_square/predictor1": losses["loss_square/predictor1"] * float("nan")} if index == 1 else {}
        )

    model.losses_of = poisoned
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLossError, match="loss_square/predictor1 = nan"):
        run(model, build_update(name))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_step_in_backward_stops_before_the_offending_block():
    model = make_model()
    losses_of = model.losses_of
    model.losses_of = lambda index, *rest: {
        key: value / (0.0 if index == 1 and key.startswith("loss") else 1.0)
        for key, value in losses_of(index, *rest).items()
    }
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLossError, match="loss_square/predictor1 = inf"):
        run(model, build_update("sequential", True))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert moved and all(key.startswith("predictors.0") for key in moved)


def test_a_non_finite_gradient_changes_nothing():
    model = make_model()
    model.predictors[2][0].weight.register_hook(lambda grad: grad * float("inf"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLossError, match="gradient of block predictor2"):
        run(model, build_update("sequential"))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_item_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="No entry"):
        sum_losses({"accuracy": torch.tensor(1.0)})
