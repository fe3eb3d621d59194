"""What autograd holds for a backward, and that local updates hold one predictor's at a time."""

import contextlib

import pytest
import torch
from toy_model import toy_config

from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.local_update.activations import SavedActivations
from dfm_d2.local_update.updates import build_update


def test_saved_tensors_are_counted_once_and_until_they_are_freed():
    x = torch.ones(1000, requires_grad=True)
    weight = torch.ones(1000, requires_grad=True)
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


def peak_of(make_model, make_input, update: str, count: int, meta_architecture: str = "FlowDetector") -> int:
    model = make_model(meta_architecture, NUM_PREDICTORS=count, NUM_PROPOSALS=40).train()
    optimizer = build_block_optimizer(toy_config(), model)
    strategy = build_update(update, step_in_backward=False)
    prepared = model.prepare([make_input("a"), make_input("b", boxes=())], 3)
    with SavedActivations(model.parameters()) as saved:
        strategy.step(model, prepared, optimizer, contextlib.nullcontext)
    return saved.peak


@pytest.mark.parametrize("backbone", ["joint", "cascade"])
def test_activations_of_sequential_updates_do_not_grow_with_the_number_of_predictors(
    make_model, make_input, backbone
):
    meta_architecture = "CascadeDetector" if backbone == "cascade" else "FlowDetector"
    reference = [peak_of(make_model, make_input, "joint", d, meta_architecture) for d in (1, 12)]
    sequential = [peak_of(make_model, make_input, "sequential", d) for d in (1, 12)]
    assert reference[1] > 1.5 * reference[0]
    assert sequential[1] - sequential[0] <= 0.03 * (reference[1] - reference[0])


def test_a_sequential_step_makes_each_predictor_look_once(make_model, make_input):
    model = make_model(NUM_PREDICTORS=4).train()
    looks = []
    for index, head in enumerate(model.predictors):
        head.register_forward_hook(lambda *_, index=index: looks.append(index))
    model.backbone.register_forward_hook(lambda *_: looks.append("backbone"))
    optimizer = build_block_optimizer(toy_config(), model)
    strategy = build_update("sequential", step_in_backward=False)
    strategy.step(model, model.prepare([make_input("a")], 0), optimizer, contextlib.nullcontext)
    assert looks == ["backbone", 0, 1, 2, 3]
