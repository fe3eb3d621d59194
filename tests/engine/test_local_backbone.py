"""BACKBONE_UPDATE local: every stage of the backbone is a block, and no gradient leaves it."""

import itertools

import pytest
import torch
from tiny_model import tiny_cfg
from toy_model import make_trainer

from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.framework import LRScheduler, build_model
from dfm_d2.local_update import HandOver, check_blocks, sum_losses

STAGES = ["res2", "res3", "res4", "res5"]


@pytest.fixture
def model(make_model):
    return make_model(BACKBONE_UPDATE="local").train()


def test_each_parameter_is_in_the_block_of_its_stage(model):
    blocks = model.blocks()
    assert list(blocks) == [*STAGES, "shared", "predictor0", "predictor1", "predictor2"]
    check_blocks(blocks, [(n, p) for n, p in model.named_parameters()])
    prefixes = {name: {".".join(n.split(".")[:3]) for n, _ in named} for name, named in blocks.items()}
    assert "backbone.bottom_up.stem" in prefixes["res2"]
    assert {p for p in prefixes["res4"] if p.startswith("backbone")} == {"backbone.bottom_up.res4"}
    assert all(".bottom_up" not in prefix for prefix in prefixes["shared"])


def test_no_loss_has_gradients_outside_of_its_own_block(model, inputs):
    """Stages and predictors; the features that predictors see reach the FPN, and no stage."""
    items = model.block_losses(model.prepare(inputs, 7), HandOver())
    for expected in [*STAGES, "predictor0"]:
        (block,), losses, _ = next(items)
        assert block == expected
        assert sorted(key for key in losses) == [f"loss_{key}/{block}" for key in ("cls", "giou", "l1")]
        model.zero_grad(set_to_none=True)
        sum_losses(losses).backward()
        for other, named in model.blocks().items():
            touched = [parameter.grad is not None for _, parameter in named]
            if (other, block) == ("shared", "predictor0"):
                assert any(touched)
            else:
                assert all(touched) if other == block else not any(touched), (block, other)


def test_stage_by_stage_gives_the_features_of_the_backbone(model, inputs):
    prepared, seen = model.prepare(inputs, 7), []
    model.eval()  # batch norms would see their running statistics move
    with torch.no_grad():
        hand_over = HandOver()
        hand_over.open = lambda features: seen.extend(features) or features
        list(model.block_losses(prepared, hand_over))
        expected = model._features(prepared.images)
    assert len(seen) == len(expected) == 4 and all(map(torch.equal, seen, expected))


def test_frozen_stages_have_no_predictor_and_a_backbone_without_stages_is_one_line():
    cfg = tiny_cfg(BACKBONE_UPDATE="local")
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    assert list(build_model(cfg).stage_predictors) == ["res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DFM.HEAD.IN_FEATURES = "build_resnet_backbone", ["res2"]
    with pytest.raises(ValueError, match="BACKBONE_UPDATE local needs a pyramid on stages"):
        build_model(cfg)


def test_inference_does_not_see_the_stages(make_model, make_input):
    plain, local = make_model().eval(), make_model(BACKBONE_UPDATE="local").eval()
    unexpected = local.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert unexpected and all(name.startswith("stage_predictors.") for name in unexpected)
    a, b = (m([make_input("a")])[0]["instances"] for m in (plain, local))
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=0)


def trainer_of(model, make_input, folder, optimizer: str):
    """The trainer of train_net, with a schedule, and its checkpointer."""

    def loader(start):
        return ([make_input(f"i{position}")] for position in itertools.count(start))

    trainer = make_trainer(model, loader, images_per_step=1, OPTIMIZER=optimizer, MOMENTUM=0.9)
    trainer.register_hooks([LRScheduler()])
    return trainer, SafeCheckpointer(model, str(folder), trainer=trainer)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("first, second", itertools.pairwise(["accumulate", "local", "frozen", "accumulate"]))
def test_a_run_of_one_mode_continues_in_another(make_model, make_input, tmp_path, first, second, optimizer):
    model, other = make_model(BACKBONE_UPDATE=first), make_model(seed=1, BACKBONE_UPDATE=second)
    trainer, checkpointer = trainer_of(model, make_input, tmp_path, optimizer)
    trainer.train(0, 2)
    trainer.iter = 1  # as a hook finds it after the last step
    checkpointer.save("model")
    continued, checkpointer = trainer_of(other, make_input, tmp_path, optimizer)
    checkpointer.resume_or_load("")
    weights, loaded = model.state_dict(), other.state_dict()
    shared = weights.keys() & loaded.keys()
    assert len(shared) == min(len(weights), len(loaded))
    assert all(torch.equal(weights[name], loaded[name]) for name in shared)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert {group["lr"] for group in continued.optimizer.param_groups} == rates
    continued.train(2, 4)
    key = "step" if optimizer == "adamw" else "momentum_buffer"
    state = continued.optimizer.state_dict()["state"]["predictors.0.box_answer.weight"][key]
    assert state == 4 if optimizer == "adamw" else state.any()
    assert all(value.isfinite().all() for value in other.state_dict().values())
