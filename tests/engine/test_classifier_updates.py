"""Classifiers in the engine: update modes agree, blocks are freed one by one, and a resume is bit for bit."""

import contextlib

import pytest
import torch
from tiny_classifier import VIT, class_inputs, make_classifier
from toy_model import toy_config

from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.local_update.activations import SavedActivations
from dfm_d2.local_update.updates import build_update

BACKBONES = {"cnn": [], "vit": VIT, "learned": ["MODEL.CLASSIFIER.EMBEDDING", "learned"]}


BASELINES = ("forward_forward", "stochastic_forward_forward")


def steps(model, update: str, step_in_backward: bool = False, number: int = 3, **solver):
    optimizer = build_block_optimizer(toy_config(**solver), model)
    strategy = build_update(update, step_in_backward)
    for iteration in range(number):
        prepared = model.prepare(class_inputs(), iteration)
        metrics = strategy.step(model, prepared, optimizer, contextlib.nullcontext)
    return metrics


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("update", ["sequential", "step in backward", "parallel"])
def test_the_update_modes_agree_in_float64_after_adamw_steps(name, update):
    models = [make_classifier(*BACKBONES[name]).double().train() for _ in range(2)]
    joint = steps(models[0], "joint")
    local = steps(models[1], *(("sequential", True) if update == "step in backward" else (update,)))
    assert joint.keys() == local.keys()
    for (key, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("method", BASELINES)
def test_the_update_modes_agree_for_the_local_baselines(method):
    models = [make_classifier(method=method).double().train() for _ in range(2)]
    steps(models[0], "joint")
    steps(models[1], "sequential", True)
    for (key, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=key)


def test_sequential_holds_the_activations_of_one_block_at_a_time():
    """Of equal blocks, the peak with four is that with two; with one backward it is about twice as much."""

    def peak(update: str, depth: int) -> int:
        options = f'["img_size=16","patch_size=4","embed_dim=32","depth={depth}","num_heads=2"]'
        model = make_classifier(*VIT[:2], "MODEL.CLASSIFIER.TIMM.OPTIONS", options).train()
        optimizer = build_block_optimizer(toy_config(), model)
        prepared = model.prepare(class_inputs(8, size=16), 0)
        with SavedActivations(exclude=model.parameters()) as saved:
            build_update(update, False).step(model, prepared, optimizer, contextlib.nullcontext)
        return saved.peak

    assert peak("sequential", 4) < 1.05 * peak("sequential", 2)
    assert peak("joint", 4) > 1.7 * peak("joint", 2)


def test_backprop_trains_everything_jointly():
    model = make_classifier(method="backprop").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = steps(model, "joint")
    assert {"loss_readout/head", "right/head", "grad_norm/shared"} == metrics.keys()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(list(model.parameters()))
