"""The real detector: block by block gives the gradients of one backward, with the memory of one block."""

import copy

import pytest
import torch
from toy_model import moved, toy_config, train_steps

from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.local_update import SavedActivations, attached_losses

# Two intervals of two members each, which roll out within them.
MEMBERS = {"NUM_PREDICTORS": 4, "INTERVALS": 2, "ROLLOUT": 2}
OPTIONS = [{"ROLLOUT": 1}, {"ROLLOUT": 0}, {"INTERVALS": 1}, {"NUM_PREDICTORS": 1}, MEMBERS]
FROZEN = [("FlowDetector", "in backward"), ("FlowDetector", "joint"), ("CascadeDetector", "joint")]


@pytest.mark.parametrize("options", [*OPTIONS, {"BACKBONE_UPDATE": "local"}], ids=str)
@pytest.mark.parametrize("update", ["sequential", "in backward"])
def test_sequential_equals_joint_in_float64(make_model, inputs, options, update):
    """The directions of all gradients by the weights after AdamW, their sizes by the norms of the blocks."""
    joint, local, untrained = (make_model(**options).double().train() for _ in range(3))
    _, metrics = train_steps(joint, "joint", inputs, steps=3)
    _, local_metrics = train_steps(local, update, inputs, steps=3)
    assert "predictors.0.box_answer.weight" in moved(joint, untrained.state_dict())
    assert all(metrics[f"grad_norm/{block}"] > 0 for block in joint.blocks())
    torch.testing.assert_close(local_metrics, metrics, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(local.state_dict(), joint.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sequential_has_the_gradients_of_joint_in_float32(make_model, inputs, options):
    joint, sequential = (make_model(**options).train() for _ in range(2))
    train_steps(joint, "joint", inputs)
    train_steps(sequential, "sequential", inputs)
    for named, others in zip(joint.blocks().values(), sequential.blocks().values(), strict=True):
        pairs = [(p.grad, q.grad) for (_, p), (_, q) in zip(named, others) if p.grad is not None]
        expected, found = (torch.cat([grad.flatten() for grad in grads]) for grads in zip(*pairs))
        assert 0 < expected.norm() and (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("update", ["joint", "sequential", "parallel"])
def test_on_a_cpu_each_part_goes_forward_once_in_a_step(make_model, inputs, monkeypatch, update):
    """A parallel update, too, takes the predictors one by one there."""
    model, calls = make_model().train(), []
    monkeypatch.setattr(model.predictors, "answer_together", lambda *_: pytest.fail("batched on a CPU"))
    for name, module in [("backbone", model.backbone), *model.predictors.named_children()]:
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    _, metrics = train_steps(model, update, inputs)
    assert calls == ["backbone", "0", "1", "2"]
    expected = {f"loss_{name}/predictor{d}" for name in ("cls", "l1", "giou") for d in range(3)}
    assert {key for key in metrics if key.startswith("loss")} == expected


@pytest.mark.parametrize("interaction", ["dynamic_conv", "grid_linear"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_predictors_together_have_losses_and_gradients_of_a_loop(make_model, inputs, options, interaction):
    losses, gradients = {}, {}
    for together in (False, True):
        model = make_model(HEAD__INTERACTION=interaction, **options).train()
        losses[together] = attached_losses(model, model.prepare(inputs, 7), together=together)
        sum(value for key, value in losses[together].items() if key.startswith("loss")).backward()
        gradients[together] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-5, atol=1e-6)
    assert gradients[False].keys() == gradients[True].keys()
    for key, expected in gradients[False].items():
        error = (gradients[True][key] - expected).norm()
        assert error <= 1e-4 * expected.norm() + 1e-7, key


def test_activations_of_sequential_updates_do_not_grow_with_the_number_of_predictors(make_model, make_input):
    def growth(update: str, architecture: str = "FlowDetector") -> tuple[float, int]:
        """Of the peak, from 1 predictor to 12: the ratio and the bytes."""
        peaks = []
        for count in (1, 12):
            model = make_model(architecture, NUM_PREDICTORS=count, NUM_PROPOSALS=40).train()
            with SavedActivations(model.parameters()) as saved:
                train_steps(model, update, [make_input("a"), make_input("b", boxes=())])
            peaks.append(saved.peak)
        return peaks[1] / peaks[0], peaks[1] - peaks[0]

    _, sequential = growth("sequential")
    for reference in (growth("joint"), growth("joint", "CascadeDetector")):
        assert reference[0] > 1.5 and sequential <= 0.03 * reference[1]


@pytest.mark.parametrize(("architecture", "update"), FROZEN)
def test_with_a_frozen_backbone_only_predictors_move(make_model, make_input, architecture, update):
    model = make_model(architecture, BACKBONE_UPDATE="frozen").eval().train()
    assert model.blocks()["shared"] == []
    inputs, before = [make_input("a"), make_input("b")], copy.deepcopy(model.state_dict())
    optimizer, metrics = train_steps(model, update, inputs, steps=2)
    changed = moved(model, before)
    assert {name.split(".")[0] for name in changed} == {"predictors"}
    assert {name.split(".")[1] for name in changed} == {"0", "1", "2"}
    assert "grad_norm/shared" not in metrics and "grad_norm/predictor0" in metrics
    assert model.training and model.predictors.training and not model.backbone.training
    optimizer.load_state_dict(optimizer.state_dict())  # a checkpoint of the run goes back in
    train_steps(model, update, inputs, optimizer=optimizer)
    assert {name.split(".")[0] for name in moved(model, before)} == {"predictors"}


def test_otherwise_the_statistics_move_and_its_checkpoint_starts_a_frozen_run(make_model, make_input):
    model, frozen = make_model().train(), make_model(BACKBONE_UPDATE="frozen")
    before = copy.deepcopy(model.state_dict())
    optimizer, _ = train_steps(model, "sequential", [make_input("a")])
    assert any(n.startswith("backbone.") and n.endswith("running_mean") for n in moved(model, before))
    assert model.backbone.training
    build_block_optimizer(toy_config(), frozen).load_state_dict(optimizer.state_dict())
