"""One optimizer per block: the group rules, clipping by block, and state by parameter name."""

import copy

import pytest
import torch
from test_local_update import BATCH, make_model, run
from toy_model import ToyModel, toy_config

from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.framework import build_lr_scheduler
from dfm_d2.local_update.block_optimizer import check_blocks
from dfm_d2.local_update.updates import build_update


def options_by_name(optimizer) -> dict[str, tuple[float, float]]:
    return {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.state_dict()["groups"]
        for name in group["names"]
    }


def test_rates_and_decays_follow_the_config():
    cfg = toy_config(BACKBONE_MULTIPLIER=0.1, WEIGHT_DECAY=0.5, WEIGHT_DECAY_NORM=0.0, WEIGHT_DECAY_BIAS=0.25)
    options = options_by_name(build_block_optimizer(cfg, make_model()))
    assert options["backbone.bottom_up.0.weight"] == (pytest.approx(0.001), 0.5)
    assert options["backbone.bottom_up.1.weight"] == (pytest.approx(0.001), 0.0)
    assert options["backbone.fpn.weight"] == (0.01, 0.5)
    assert options["backbone.fpn.bias"] == (0.01, 0.25)
    assert options["predictors.0.1.bias"] == (0.01, 0.0)
    assert options.keys() == dict(make_model().named_parameters()).keys()


def test_a_scheduler_drives_the_inner_optimizers():
    model = make_model()
    cfg = toy_config()
    optimizer = build_block_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    first = options_by_name(optimizer)["predictors.0.0.weight"][0]
    before = copy.deepcopy(model.state_dict())
    build_update("sequential", False).step(model, model.prepare(BATCH, 0), optimizer, torch.enable_grad)
    scheduler.step()
    assert options_by_name(optimizer)["predictors.0.0.weight"][0] > first
    weight = model.predictors[0][0].weight
    moved = (weight - before["predictors.0.0.weight"]).abs().max()
    assert moved <= 2 * first  # a first step of AdamW is at most the rate, and decay


def test_each_block_is_clipped_by_its_own_norm():
    model = make_model()
    _, metrics = run(model, build_update("sequential", False), BLOCK_CLIP_NORM=1e-3)
    for block, named in model.blocks().items():
        norm = torch.stack([parameter.grad.norm() for _, parameter in named]).norm()
        assert metrics[f"grad_norm/{block}"] > 1e-3
        torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_a_parameter_in_two_blocks_or_in_none_is_an_error():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="a2 is in the blocks predictor0 and predictor1"):
        check_blocks({"predictor0": [("a", a)], "predictor1": [("a2", a)]})
    with pytest.raises(ValueError, match="b is in no block"):
        check_blocks({"predictor0": [("a", a)]}, [("a", a), ("b", b)])
    model = make_model()
    model.extra = torch.nn.Parameter(torch.zeros(1))
    model.blocks = lambda: ToyModel.blocks(model) | {"shared": []}
    with pytest.raises(ValueError, match="is in no block"):
        build_block_optimizer(toy_config(), model)


@pytest.mark.parametrize(("first", "second"), [("joint", "sequential"), ("sequential", "joint")])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_goes_from_mode_to_mode_by_name(first, second, kind):
    straight = make_model(torch.float64)
    run(straight, build_update("joint", False), 4, OPTIMIZER=kind)
    model = make_model(torch.float64)
    optimizer, _ = run(model, build_update(first, False), 2, OPTIMIZER=kind)
    twin = make_model(torch.float64)
    twin.load_state_dict(model.state_dict())
    continued = build_block_optimizer(toy_config(OPTIMIZER=kind), twin)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for iteration in (2, 3):
        build_update(second, False).step(twin, twin.prepare(BATCH, iteration), continued, torch.enable_grad)
    for (name, a), b in zip(straight.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)


def test_state_loads_into_a_run_with_other_groups():
    optimizer, _ = run(make_model(), build_update("joint", False), 2)
    other = build_block_optimizer(toy_config(BACKBONE_MULTIPLIER=0.5), make_model())
    other.load_state_dict(optimizer.state_dict())
    saved, loaded = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name]["exp_avg"], loaded[name]["exp_avg"]) for name in saved)


def test_a_state_that_does_not_fit_is_an_error():
    optimizer, _ = run(make_model(), build_update("joint", False))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="set SOLVER.OPTIMIZER"):
        build_block_optimizer(toy_config(OPTIMIZER="sgd"), make_model()).load_state_dict(state)
    other = build_block_optimizer(toy_config(), make_model())
    other._names = {parameter: f"other.{name}" for parameter, name in other._names.items()}
    with pytest.raises(ValueError, match="knows no parameter of this model, for example not other.backbone"):
        other.load_state_dict(state)
    name = "predictors.0.0.weight"
    state["state"][name] = {**state["state"][name], "exp_avg": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match=f"{name} has the shape"):
        build_block_optimizer(toy_config(), make_model()).load_state_dict(state)


def test_what_was_frozen_then_starts_anew_at_the_schedule_s_rate():
    frozen = make_model()
    frozen.backbone.requires_grad_(False)
    frozen.blocks = lambda: ToyModel.blocks(frozen) | {"shared": []}
    trained, _ = run(frozen, build_update("sequential", False), 2)
    for group in trained.param_groups:
        group["initial_lr"], group["lr"] = 0.01, 0.0025
    model = make_model()
    optimizer = build_block_optimizer(toy_config(BACKBONE_MULTIPLIER=0.1), model)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    optimizer.load_state_dict(trained.state_dict())
    states = optimizer.state_dict()["state"]
    assert states and all(name.startswith("predictors.") for name in states)
    rates = {name: group["lr"] for group in optimizer.state_dict()["groups"] for name in group["names"]}
    assert rates["predictors.0.0.weight"] == pytest.approx(0.0025)
    assert rates["backbone.bottom_up.0.weight"] == pytest.approx(0.00025)
    run_on = build_update("sequential", False)
    run_on.step(model, model.prepare(BATCH, 2), optimizer, torch.enable_grad)
    assert "backbone.bottom_up.0.weight" in optimizer.state_dict()["state"]


def test_an_unknown_optimizer_is_an_error():
    with pytest.raises(KeyError, match="lion"):
        build_block_optimizer(toy_config(OPTIMIZER="lion"), make_model())
    with pytest.raises(ValueError, match="takes no closure"):
        build_block_optimizer(toy_config(), make_model()).step(lambda: 0.0)
