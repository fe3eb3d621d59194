"""One optimizer per block: options, clipping by block, state by parameter name, and the fp16 loss scale."""

import copy

import pytest
import torch
from toy_model import BATCH, ToyModel, make_toy, moved, toy_config, train_steps

from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.framework import build_lr_scheduler
from dfm_d2.local_update import check_blocks


def options_by_name(optimizer) -> dict[str, tuple[float, float]]:
    groups = optimizer.state_dict()["groups"]
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_rates_and_decays_follow_the_config():
    decays = {"WEIGHT_DECAY": 0.5, "WEIGHT_DECAY_NORM": 0.0, "WEIGHT_DECAY_BIAS": 0.25}
    cfg = toy_config(BACKBONE_MULTIPLIER=0.1, LAYER_DECAY=0.5, **decays)
    options = options_by_name(build_block_optimizer(cfg, make_toy()))
    assert options["backbone.bottom_up.0.weight"] == (pytest.approx(0.0005), 0.5)
    assert options["backbone.bottom_up.1.weight"] == (pytest.approx(0.001), 0.0)
    assert options["backbone.fpn.weight"] == (0.01, 0.5)
    assert options["backbone.fpn.bias"] == (0.01, 0.25)
    assert options["predictors.0.1.bias"] == (0.01, 0.0)
    assert options.keys() == dict(make_toy().named_parameters()).keys()


def test_a_scheduler_drives_the_inner_optimizers():
    model, cfg = make_toy(), toy_config()
    optimizer = build_block_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    first = options_by_name(optimizer)["predictors.0.0.weight"][0]
    before = model.predictors[0][0].weight.detach().clone()
    train_steps(model, "sequential", optimizer=optimizer)
    scheduler.step()
    assert options_by_name(optimizer)["predictors.0.0.weight"][0] > first
    change = (model.predictors[0][0].weight - before).abs().max()
    assert change <= 2 * first  # a first step of AdamW is at most the rate, and decay


def test_each_block_is_clipped_by_its_own_norm():
    model = make_toy()
    _, metrics = train_steps(model, "sequential", BLOCK_CLIP_NORM=1e-3)
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
    model = make_toy()
    model.blocks = lambda: ToyModel.blocks(model) | {"shared": []}
    with pytest.raises(ValueError, match="is in no block"):
        build_block_optimizer(toy_config(), model)


@pytest.mark.parametrize(("first", "second"), [("joint", "sequential"), ("sequential", "joint")])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_goes_from_mode_to_mode_by_name(first, second, kind):
    straight, model, twin = (make_toy(torch.float64) for _ in range(3))
    train_steps(straight, "joint", steps=4, OPTIMIZER=kind)
    optimizer, _ = train_steps(model, first, steps=2, OPTIMIZER=kind)
    twin.load_state_dict(model.state_dict())
    continued = build_block_optimizer(toy_config(OPTIMIZER=kind), twin)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_steps(twin, second, steps=2, start=2, optimizer=continued)
    torch.testing.assert_close(twin.state_dict(), straight.state_dict(), rtol=0, atol=1e-9)


def test_a_state_loads_into_a_run_with_other_groups_and_one_that_does_not_fit_is_an_error():
    state = train_steps(make_toy(), "joint", steps=2)[0].state_dict()
    other = build_block_optimizer(toy_config(BACKBONE_MULTIPLIER=0.5), make_toy())
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict()["state"], state["state"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="optimizer is AdamW, this run's is SGD"):
        build_block_optimizer(toy_config(OPTIMIZER="sgd"), make_toy()).load_state_dict(state)
    other._names = {parameter: f"other.{name}" for parameter, name in other._names.items()}
    with pytest.raises(ValueError, match="knows no parameter of this model, for example not other.backbone"):
        other.load_state_dict(state)
    name = "predictors.0.0.weight"
    state["state"][name] = {**state["state"][name], "exp_avg": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match=f"{name} has the shape"):
        build_block_optimizer(toy_config(), make_toy()).load_state_dict(state)


def test_what_was_frozen_then_starts_anew_at_the_schedule_s_rate():
    frozen = make_toy()
    frozen.backbone.requires_grad_(False)
    frozen.blocks = lambda: ToyModel.blocks(frozen) | {"shared": []}
    trained, _ = train_steps(frozen, "sequential", steps=2)
    for group in trained.param_groups:
        group["initial_lr"], group["lr"] = 0.01, 0.0025
    model = make_toy()
    optimizer = build_block_optimizer(toy_config(BACKBONE_MULTIPLIER=0.1), model)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    optimizer.load_state_dict(trained.state_dict())
    states = optimizer.state_dict()["state"]
    assert states and all(name.startswith("predictors.") for name in states)
    options = options_by_name(optimizer)
    assert options["predictors.0.0.weight"][0] == pytest.approx(0.0025)
    assert options["backbone.bottom_up.0.weight"][0] == pytest.approx(0.00025)
    train_steps(model, "sequential", start=2, optimizer=optimizer)
    assert "backbone.bottom_up.0.weight" in optimizer.state_dict()["state"]


@pytest.mark.parametrize("update", ["joint", "sequential", "in backward"])
def test_the_loss_scale_changes_nothing_but_the_range(update):
    plain, scaled = make_toy(torch.float64), make_toy(torch.float64)
    _, metrics = train_steps(plain, update, steps=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, scaled_metrics = train_steps(scaled, update, steps=3, scaler=scaler)
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict(), rtol=0, atol=1e-9)
    torch.testing.assert_close(metrics["grad_norm/predictor1"], scaled_metrics["grad_norm/predictor1"])
    assert optimizer.state_dict()["scaler"]["scale"] == 1024.0


@pytest.mark.parametrize("update", ["joint", "sequential", "in backward"])
def test_a_block_that_overflows_is_skipped_by_itself(update):
    model = make_toy()
    # Only this weight's gradient overflows: it does not reach the features.
    model.predictors[1][0].weight.register_hook(lambda grad: grad * float("inf"))
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, metrics = train_steps(model, update, scaler=scaler)
    assert before.keys() - moved(model, before) == {key for key in before if key.startswith("predictors.1.")}
    assert not metrics["grad_norm/predictor1"].isfinite()
    assert scaler.get_scale() == 512.0
    twin = build_block_optimizer(toy_config(), make_toy(), torch.amp.GradScaler("cpu"))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.scaler.get_scale() == 512.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("update", ["sequential", "in backward"])
def test_half_precision_on_a_gpu_agrees_between_modes(dtype, update):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    models = {name: make_toy().cuda() for name in ("joint", update)}
    items = [item | {"image": item["image"].cuda()} for item in BATCH]
    for name, model in models.items():
        scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 else None
        autocast = lambda: torch.autocast("cuda", dtype)  # noqa: E731
        _, metrics = train_steps(model, name, items, steps=3, scaler=scaler, autocast=autocast)
        assert all(value.isfinite() for value in metrics.values())
    torch.testing.assert_close(models[update].state_dict(), models["joint"].state_dict(), rtol=0, atol=0.02)
