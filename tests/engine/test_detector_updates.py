"""The real detector: block by block gives the gradients of one backward."""

import contextlib
import copy

import pytest
from toy_model import toy_config

from dfm_d2.engine.block_optimizer import build_block_optimizer
from dfm_d2.engine.local_update import build_update


def gradients_of(model, inputs, update: str) -> dict:
    """The gradient of every parameter after the backward of one iteration, nothing being stepped."""
    model = copy.deepcopy(model).train()
    optimizer = build_block_optimizer(toy_config(BASE_LR=0.0, BLOCK_CLIP_NORM=0.0), model)
    strategy = build_update(update, "accumulate", step_in_backward=False)
    metrics = strategy.step(model, model.prepare(inputs, 7), optimizer, contextlib.nullcontext)
    losses = {key: float(value) for key, value in metrics.items() if key.startswith("loss")}
    gradients = {
        block: [parameter.grad.clone() for _, parameter in parameters if parameter.grad is not None]
        for block, parameters in model.blocks().items()
    }
    return losses, gradients


@pytest.mark.parametrize(
    "options",
    [{"ON_POLICY": 1.0}, {"ON_POLICY": 0.5}, {"ON_POLICY": 0.0}, {"TIME": "shared"}],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_sequential_gives_the_gradients_of_joint(make_model, make_input, options):
    model = make_model(**options)
    inputs = [make_input("a"), make_input("b", boxes=((1.0, 1.0, 9.0, 30.0),)), make_input("c", boxes=())]
    joint_losses, joint = gradients_of(model, inputs, "joint")
    losses, sequential = gradients_of(model, inputs, "sequential")
    assert losses == pytest.approx(joint_losses, rel=1e-6)
    assert joint.keys() == sequential.keys()
    for block, expected in joint.items():
        assert len(expected) == len(sequential[block]) > 0
        norm = sum(float(g.square().sum()) for g in expected) ** 0.5
        error = sum(float((a - b).square().sum()) for a, b in zip(sequential[block], expected)) ** 0.5
        assert 0 < norm and error <= 1e-5 * norm, block
