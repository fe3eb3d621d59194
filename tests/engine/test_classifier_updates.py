"""Classifiers in the engine: update modes agree, and blocks are freed one by one."""

import pytest
import torch
from tiny_classifier import VIT, class_inputs, make_classifier
from toy_model import moved, train_steps

from dfm_d2.local_update import SavedActivations

BACKBONES = {"cnn": [], "vit": VIT, "learned": ["MODEL.CLASSIFIER.EMBEDDING", "learned"]}
CASES = [("flow", name, update) for name in BACKBONES for update in ("sequential", "in backward", "parallel")]
CASES += [("forward_forward", "cnn", "in backward")]


@pytest.mark.parametrize(("method", "name", "update"), CASES)
def test_the_update_modes_agree_in_float64_after_adamw_steps(method, name, update):
    models = [make_classifier(*BACKBONES[name], method=method).double().train() for _ in range(2)]
    _, joint = train_steps(models[0], "joint", class_inputs(), steps=3)
    _, local = train_steps(models[1], update, class_inputs(), steps=3)
    assert joint.keys() == local.keys()
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=1e-6, atol=1e-6)


def test_sequential_holds_the_activations_of_one_block_at_a_time():
    """Of equal blocks, the peak with four is that with two; with one backward it is about twice as much."""

    def peak(update: str, depth: int) -> int:
        options = f'["img_size=16","patch_size=4","embed_dim=32","depth={depth}","num_heads=2"]'
        model = make_classifier(*VIT[:2], "MODEL.CLASSIFIER.TIMM.OPTIONS", options).train()
        with SavedActivations(exclude=model.parameters()) as saved:
            train_steps(model, update, class_inputs(8, size=16))
        return saved.peak

    assert peak("sequential", 4) < 1.05 * peak("sequential", 2)
    assert peak("joint", 4) > 1.7 * peak("joint", 2)


def test_backprop_trains_everything_jointly():
    model = make_classifier(method="backprop").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, metrics = train_steps(model, "joint", class_inputs(), steps=3)
    assert {"loss_readout/head", "right/head", "grad_norm/shared"} == metrics.keys()
    assert dict(model.named_parameters()).keys() <= moved(model, before)
