"""The trainer's errors and state, the averaged weights, the best checkpoint, progress and metrics.json."""

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from toy_model import ToyModel, toy_config, toy_loader

from dfm_d2.engine.checkpoint import CheckpointHook, SafeCheckpointer
from dfm_d2.engine.ema import ModelEMA
from dfm_d2.engine.hooks import BestCheckpointHook, EMAHook, ProgressBar, loss_by_block
from dfm_d2.engine.metrics import cut_back, flatten, read_metrics
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.engine.precision import resolve_amp_dtype
from dfm_d2.engine.trainer import LocalUpdateTrainer, get_rng_state, set_rng_state
from dfm_d2.framework import PROVIDER, EvalHook, JSONWriter, PeriodicWriter
from dfm_d2.local_update.errors import NonFiniteLossError
from dfm_d2.local_update.updates import build_update


def make_trainer(model=None, update="sequential", **solver) -> LocalUpdateTrainer:
    torch.manual_seed(0)
    model = ToyModel() if model is None else model
    optimizer = build_block_optimizer(toy_config(**solver), model)
    strategy = build_update(update, False)
    return LocalUpdateTrainer(
        model.train(), toy_loader, optimizer, strategy, contextlib.nullcontext, images_per_step=4
    )


def test_a_non_finite_loss_names_everything_and_spares_the_checkpoint(tmp_path):
    model = ToyModel()
    trainer = make_trainer(model)
    checkpointer = SafeCheckpointer(model, str(tmp_path), trainer=trainer)
    evaluated = []
    trainer.register_hooks(
        [
            EvalHook(0, lambda: evaluated.append(1) if not trainer.failed else {}),
            CheckpointHook(checkpointer, 2, 2),
        ]
    )
    prepare = model.prepare

    def poisoned(batch, iteration):
        prepared = prepare(batch, iteration)
        prepared.targets[:, 2] /= iteration != 5
        return prepared

    model.prepare = poisoned
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train(0, 6)
    message = str(caught.value)
    assert "at iteration 5" in message and "loss_square/predictor2" in message
    assert "loss_square/predictor1" not in message and "The last checkpoint is intact" in message
    assert "['toy20', 'toy21', 'toy22', 'toy23']" in message
    assert not evaluated
    twin = ToyModel()
    SafeCheckpointer(twin, str(tmp_path)).resume_or_load("")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert all(value.isfinite().all() for value in twin.state_dict().values())


def test_a_non_finite_loss_is_no_traceback_in_the_log(caplog):
    trainer = make_trainer()
    nan = torch.tensor(float("nan"), requires_grad=True)
    trainer.model.losses_of = lambda index, *rest: {f"loss/predictor{index}": nan}
    with pytest.raises(NonFiniteLossError):
        trainer.train(0, 1)
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_any_other_error_is_logged_as_the_provider_does(caplog):
    trainer = make_trainer()
    trainer.model.prepare = lambda batch, iteration: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train(0, 1)
    assert bool([record for record in caplog.records if record.exc_info]) == (PROVIDER == "detectron2")


def test_all_generators_come_back():
    state = get_rng_state()
    drawn = random.random(), np.random.randn(), torch.rand(1)
    np.random.rand(3), torch.rand(5), random.random()
    set_rng_state(state)
    assert drawn == (random.random(), np.random.randn(), torch.rand(1))


def test_ema_follows_its_equation():
    model = ToyModel()
    ema = ModelEMA(model, decay=0.25)
    name = "backbone.fpn.weight"
    weight = model.backbone.fpn.weight
    expected = weight.detach().clone()
    for n in range(6):
        with torch.no_grad():
            weight.add_(1.0)
        ema.update()
        ratio = min(0.25, (1 + n) / (10 + n))
        expected = ratio * expected + (1 - ratio) * weight.detach()
        torch.testing.assert_close(ema.weights[name], expected)
    own = weight.detach().clone()
    with ema.applied():
        assert torch.equal(weight, ema.weights[name])
    assert torch.equal(weight, own)
    with pytest.raises(ValueError, match="EMA_DECAY is 1.0"):
        ModelEMA(model, 1.0)


def test_ema_restores_the_weights_after_an_error_and_from_a_state():
    model = ToyModel()
    ema = ModelEMA(model, 0.9)
    own = model.backbone.fpn.weight.detach().clone()
    ema.weights["backbone.fpn.weight"] += 1.0
    with pytest.raises(KeyError), ema.applied():
        raise KeyError("evaluation failed")
    assert torch.equal(model.backbone.fpn.weight, own)
    twin = ModelEMA(model, 0.9)
    twin.load_state_dict(ema.state_dict())
    assert torch.equal(twin.weights["backbone.fpn.weight"], own + 1.0)
    with pytest.raises(ValueError, match="do not have predictors.3.0.weight"):
        ModelEMA(ToyModel(num_predictors=4), 0.9).load_state_dict(ema.state_dict())


def run_with_scores(folder, scores, start=0):
    """Train four iterations a score; the evaluation after each four finds the next score."""
    model, found = ToyModel(), iter(scores)
    trainer = make_trainer(model)
    checkpointer = SafeCheckpointer(model, str(folder), trainer=trainer)
    trainer.register_hooks(
        [
            EvalHook(4, lambda: flatten({"bbox": {"AP50": next(found)}})),
            BestCheckpointHook(checkpointer, "bbox/AP50"),
            PeriodicWriter([JSONWriter(str(folder / "metrics.json"))], 4),
            CheckpointHook(checkpointer, 4, 2),
        ]
    )
    trainer.train(start, start + 4 * len(scores))


def test_the_best_checkpoint_is_kept_apart(tmp_path):
    run_with_scores(tmp_path, [10.0, 30.0, 20.0])
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best["iteration"] == 7
    assert json.loads((tmp_path / "model_best.json").read_text()) == {
        "metric": "bbox/AP50",
        "value": 30.0,
        "iteration": 7,
    }
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    before = (tmp_path / "model_best.pth").read_bytes()
    run_with_scores(tmp_path, [29.0], start=12)
    assert (tmp_path / "model_best.pth").read_bytes() == before
    run_with_scores(tmp_path, [31.0], start=16)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 19


def test_the_last_line_of_metrics_is_the_last_evaluation(tmp_path):
    run_with_scores(tmp_path, [10.0, 30.0])
    lines = read_metrics(tmp_path / "metrics.json")
    assert lines[-1]["bbox/AP50"] == 30.0 and lines[-1]["iteration"] == 8


def test_metrics_are_cut_back(tmp_path):
    path = tmp_path / "metrics.json"
    assert cut_back(path, 5) == 0 and not path.exists()
    path.write_text("".join(json.dumps({"iteration": i, "loss": 0.5}) + "\n" for i in range(10)) + '{"iterat')
    assert cut_back(path, 6) == 6
    assert [entry["iteration"] for entry in read_metrics(path)] == list(range(6))
    path.write_text('{"iteration": 0}\nnot json\n{"iteration": 1}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        cut_back(path, 1)


def test_metrics_are_flat_and_without_nan():
    flat = flatten({"bbox": {"AP": 1, "AP-cat": float("nan")}, "other": {"bbox": {"AP": 2.0}}})
    assert flat == {"bbox/AP": 1.0, "other/bbox/AP": 2.0}


@pytest.mark.parametrize("use_bar", [True, False])
def test_progress_tells_the_loss_of_each_predictor(use_bar, caplog, capsys):
    trainer = make_trainer()
    trainer.register_hooks([EMAHook(ModelEMA(trainer.model, 0.9)), ProgressBar(2, use_bar)])
    with caplog.at_level("INFO", logger="dfm_d2.engine.hooks"):
        trainer.train(0, 5)
    lines = [record.message for record in caplog.records if record.name == "dfm_d2.engine.hooks"]
    text = capsys.readouterr().err if use_bar else "\n".join(lines)
    assert len(lines) == (0 if use_bar else 3)
    assert all(word in text for word in ("total", "predictor0", "predictor1", "predictor2", "5/5"))
    if not use_bar:
        assert "s/it" in text and "ETA" in text


def test_losses_are_summed_by_predictor():
    metrics = {
        "loss_cls/predictor0": 1.0,
        "loss_l1/predictor0": 2.0,
        "loss_cls/predictor10": 4.0,
        "loss_cls/predictor2": 3.0,
        "lr": 9.0,
    }
    assert list(loss_by_block(metrics).items()) == [
        ("predictor0", 3.0),
        ("predictor2", 3.0),
        ("predictor10", 4.0),
    ]


def test_precision_choices():
    cpu = torch.device("cpu")
    assert resolve_amp_dtype(False, "auto", cpu) is None
    assert resolve_amp_dtype(True, "bfloat16", cpu) == torch.bfloat16
    assert resolve_amp_dtype(True, "auto", cpu) in (None, torch.bfloat16)
    with pytest.raises(ValueError, match="float16 needs a CUDA device"):
        resolve_amp_dtype(True, "float16", cpu)
    with pytest.raises(KeyError, match="half"):
        resolve_amp_dtype(True, "half", cpu)
