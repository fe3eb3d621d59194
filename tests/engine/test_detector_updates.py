"""The real detector: block by block gives the gradients of one backward."""

import contextlib
import copy

import pytest
import torch
from toy_model import toy_config

from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.local_update import attached_losses, build_update

OPTIONS = [{"ON_POLICY": 1.0}, {"ON_POLICY": 0.5}, {"ON_POLICY": 0.0}, {"TIME": "shared"}]


def name_of(options: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


@pytest.fixture
def inputs(make_input):
    return [make_input("a"), make_input("b", boxes=((1.0, 1.0, 9.0, 30.0),)), make_input("c", boxes=())]


def gradients_of(model, inputs, update: str) -> dict:
    """The gradient of every parameter after the backward of one iteration, nothing being stepped."""
    model = copy.deepcopy(model).train()
    optimizer = build_block_optimizer(toy_config(BASE_LR=0.0, BLOCK_CLIP_NORM=0.0), model)
    strategy = build_update(update)
    metrics = strategy.step(model, model.prepare(inputs, 7), optimizer, contextlib.nullcontext)
    losses = {key: float(value) for key, value in metrics.items() if key.startswith("loss")}
    gradients = {
        block: [parameter.grad.clone() for _, parameter in parameters if parameter.grad is not None]
        for block, parameters in model.blocks().items()
    }
    return losses, gradients


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_sequential_gives_the_gradients_of_joint(make_model, inputs, options):
    model = make_model(**options)
    joint_losses, joint = gradients_of(model, inputs, "joint")
    losses, sequential = gradients_of(model, inputs, "sequential")
    assert losses == pytest.approx(joint_losses, rel=1e-6)
    assert joint.keys() == sequential.keys()
    for block, expected in joint.items():
        assert len(expected) == len(sequential[block]) > 0
        norm = sum(float(g.square().sum()) for g in expected) ** 0.5
        error = sum(float((a - b).square().sum()) for a, b in zip(sequential[block], expected)) ** 0.5
        assert 0 < norm and error <= 1e-5 * norm, block


@pytest.mark.parametrize("options", [*OPTIONS, {"NUM_PREDICTORS": 1}], ids=name_of)
@pytest.mark.parametrize("step_in_backward", [False, True])
def test_sequential_equals_joint_after_adamw_in_float64(make_model, inputs, options, step_in_backward):
    trained = []
    for name, stepping in (("joint", False), ("sequential", step_in_backward)):
        model = make_model(**options).double().train()
        optimizer = build_block_optimizer(toy_config(BLOCK_CLIP_NORM=1.0), model)
        update = build_update(name, stepping)
        for iteration in range(3):
            update.step(model, model.prepare(inputs, iteration), optimizer, contextlib.nullcontext)
        trained.append(model.state_dict())
    moved = make_model(**options).double().state_dict()
    assert (trained[0]["predictors.0.box_answer.weight"] - moved["predictors.0.box_answer.weight"]).any()
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("update", ["joint", "sequential"])
def test_each_part_goes_forward_once_in_a_step(make_model, inputs, update):
    model, calls = make_model().train(), []
    for name, module in [("backbone", model.backbone), *model.predictors.named_children()]:
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    optimizer = build_block_optimizer(toy_config(), model)
    strategy = build_update(update)
    strategy.step(model, model.prepare(inputs, 7), optimizer, contextlib.nullcontext)
    assert calls == ["backbone", "0", "1", "2"]


@pytest.mark.parametrize("interaction", ["dynamic_conv", "grid_linear"])
@pytest.mark.parametrize(
    "options",
    [{"ON_POLICY": 1.0}, {"ON_POLICY": 0.0}, {"TIME": "shared"}, {"NUM_PREDICTORS": 1}],
    ids=name_of,
)
def test_predictors_evaluated_together_have_the_losses_and_gradients_of_a_loop(
    make_model, inputs, options, interaction
):
    losses, gradients = {}, {}
    for together in (False, True):
        model = make_model(HEAD__INTERACTION=interaction, **options).train()
        losses[together] = attached_losses(model, model.prepare(inputs, 7), together=together)
        sum(value for key, value in losses[together].items() if key.startswith("loss")).backward()
        gradients[together] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key, value in losses[False].items():
        torch.testing.assert_close(losses[True][key], value, rtol=1e-5, atol=1e-6)
    assert gradients[False].keys() == gradients[True].keys()
    for key, expected in gradients[False].items():
        error = (gradients[True][key] - expected).norm()
        assert error <= 1e-4 * expected.norm() + 1e-7, key


def test_on_a_cpu_a_parallel_update_takes_the_predictors_one_by_one(make_model, make_input, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.predictors, "answer_together", lambda *_: pytest.fail("batched on a CPU"))
    assert gradients_of(model, [make_input("a")], "parallel")[0].keys() == {
        f"loss_{name}/predictor{d}" for name in ("cls", "l1", "giou") for d in range(3)
    }
