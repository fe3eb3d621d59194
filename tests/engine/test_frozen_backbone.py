"""MODEL.DFM.BACKBONE_UPDATE frozen: the backbone neither learns nor moves its running statistics."""

import contextlib
import copy

import pytest
import torch
from toy_model import toy_config

from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.local_update.updates import build_update


def step(model, inputs, update: str, backbone_update: str):
    """Two iterations; returns the optimizer, the metrics and the names of what moved."""
    optimizer = build_block_optimizer(toy_config(), model)
    strategy = build_update(update, step_in_backward=update == "sequential")
    before = copy.deepcopy(model.state_dict())
    model.eval().train()
    for iteration in range(2):
        metrics = strategy.step(model, model.prepare(inputs, iteration), optimizer, contextlib.nullcontext)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    return optimizer, metrics, moved


@pytest.mark.parametrize(
    ("architecture", "update"),
    [("FlowDetector", "sequential"), ("FlowDetector", "joint"), ("CascadeDetector", "joint")],
)
def test_only_predictors_move(make_model, make_input, architecture, update):
    model = make_model(architecture, BACKBONE_UPDATE="frozen")
    assert model.blocks()["shared"] == []
    inputs = [make_input("a"), make_input("b")]
    optimizer, metrics, moved = step(model, inputs, update, "frozen")
    assert moved and all(name.startswith("predictors.") for name in moved)
    assert {name.split(".")[1] for name in moved} == {"0", "1", "2"}
    assert "grad_norm/shared" not in metrics and "grad_norm/predictor0" in metrics
    assert model.training and model.predictors.training and not model.backbone.training
    # A checkpoint of the run goes back in.
    optimizer.load_state_dict(optimizer.state_dict())
    _, _, moved = step(model, inputs, update, "frozen")
    assert all(name.startswith("predictors.") for name in moved)


def test_otherwise_the_statistics_move(make_model, make_input):
    model = make_model()
    _, _, moved = step(model, [make_input("a")], "sequential", "accumulate")
    assert any(name.startswith("backbone.") and name.endswith("running_mean") for name in moved)
    assert model.backbone.training


def test_a_checkpoint_of_a_whole_run_starts_a_frozen_one(make_model, make_input):
    whole, frozen = make_model(), make_model(BACKBONE_UPDATE="frozen")
    optimizer, _, _ = step(whole, [make_input("a")], "sequential", "accumulate")
    build_block_optimizer(toy_config(), frozen).load_state_dict(optimizer.state_dict())
