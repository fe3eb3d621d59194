"""The trainer's errors and state, the best checkpoint, progress and metrics.json."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from tiny_model import tiny_cfg
from toy_model import ToyModel, make_toy, make_trainer

from dfm_d2.engine.checkpoint import CheckpointHook, SafeCheckpointer
from dfm_d2.engine.hooks import BestCheckpointHook, FinalEvalHook, ProgressBar, evaluation_bar, loss_by_block
from dfm_d2.engine.metrics import cut_back, flatten, read_metrics
from dfm_d2.engine.precision import inference_autocast, resolve_amp_dtype
from dfm_d2.engine.trainer import get_rng_state, set_rng_state
from dfm_d2.framework import (
    PROVIDER,
    DatasetEvaluator,
    EvalHook,
    JSONWriter,
    PeriodicWriter,
    inference_on_dataset,
)
from dfm_d2.local_update import NonFiniteLossError


def test_a_non_finite_loss_names_everything_and_spares_the_checkpoint(tmp_path):
    model, evaluated = make_toy(), []
    trainer = make_trainer(model)
    checkpointer = SafeCheckpointer(model, str(tmp_path), trainer=trainer)
    trainer.register_hooks(
        [FinalEvalHook(0, lambda: evaluated.append(1)), CheckpointHook(checkpointer, 2, 2)]
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


def test_a_non_finite_loss_is_no_traceback_in_the_log_and_other_errors_are_as_the_provider_has_it(caplog):
    def tracebacks() -> list:
        return [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]

    trainer = make_trainer(make_toy())
    nan = torch.tensor(float("nan"), requires_grad=True)
    trainer.model.losses_of = lambda index, *rest: {f"loss/predictor{index}": nan}
    with pytest.raises(NonFiniteLossError):
        trainer.train(0, 1)
    assert not tracebacks()
    trainer.model.prepare = lambda batch, iteration: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train(0, 1)
    assert bool(tracebacks()) == (PROVIDER == "detectron2")


def test_all_generators_come_back():
    state = get_rng_state()
    drawn = random.random(), np.random.randn(), torch.rand(1)
    np.random.rand(3), torch.rand(5), random.random()
    set_rng_state(state)
    assert drawn == (random.random(), np.random.randn(), torch.rand(1))


def run_with_scores(folder, scores, start=0, metric="bbox/AP50"):
    """Train four iterations a score; the evaluation after each four finds the next score."""
    model, found = ToyModel(), iter(scores)
    trainer = make_trainer(model)
    checkpointer = SafeCheckpointer(model, str(folder), trainer=trainer)
    trainer.register_hooks(
        [
            EvalHook(4, lambda: flatten({"bbox": {"AP50": next(found)}})),
            BestCheckpointHook(checkpointer, metric),
            PeriodicWriter([JSONWriter(str(folder / "metrics.json"))], 4),
            CheckpointHook(checkpointer, 4, 2),
        ]
    )
    trainer.train(start, start + 4 * len(scores))


def test_the_best_checkpoint_is_kept_apart(tmp_path):
    run_with_scores(tmp_path, [10.0, 30.0, 20.0])
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 7
    record = {"metric": "bbox/AP50", "value": 30.0, "iteration": 7}
    assert json.loads((tmp_path / "model_best.json").read_text()) == record
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    # The last line of metrics.json is the last evaluation.
    last = read_metrics(tmp_path / "metrics.json")[-1]
    assert last["bbox/AP50"] == 20.0 and last["iteration"] == 12
    before = (tmp_path / "model_best.pth").read_bytes()
    run_with_scores(tmp_path, [29.0], start=12)
    assert (tmp_path / "model_best.pth").read_bytes() == before
    run_with_scores(tmp_path, [31.0], start=16)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 19


def test_a_best_metric_that_is_not_measured_is_said_once_an_evaluation(tmp_path, caplog):
    run_with_scores(tmp_path, [10.0, 30.0], metric="bbox/AP5")
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["TEST.BEST_METRIC bbox/AP5 is not among what is measured: bbox/AP50"] * 2
    assert not (tmp_path / "model_best.pth").exists()


def test_metrics_are_cut_back(tmp_path):
    path = tmp_path / "metrics.json"
    cut_back(path, 5)
    assert not path.exists()
    path.write_text("".join(json.dumps({"iteration": i, "loss": 0.5}) + "\n" for i in range(10)) + '{"iterat')
    cut_back(path, 6)
    assert [entry["iteration"] for entry in read_metrics(path)] == list(range(6))
    path.write_text('{"iteration": 0}\nnot json\n{"iteration": 1}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        cut_back(path, 1)


def test_metrics_are_flat_and_without_nan():
    flat = flatten({"bbox": {"AP": 1, "AP-cat": float("nan")}, "other": {"bbox": {"AP": 2.0}}})
    assert flat == {"bbox/AP": 1.0, "other/bbox/AP": 2.0}


@pytest.mark.parametrize("use_bar", [True, False])
def test_progress_tells_the_loss_of_each_predictor(use_bar, caplog, capsys):
    trainer = make_trainer(make_toy())
    trainer.register_hooks([ProgressBar(2, use_bar)])
    with caplog.at_level("INFO", logger="dfm_d2.engine.hooks"):
        trainer.train(0, 5)
    lines = [record.message for record in caplog.records if record.name == "dfm_d2.engine.hooks"]
    text = capsys.readouterr().err if use_bar else "\n".join(lines)
    assert len(lines) == (0 if use_bar else 3)
    assert all(word in text for word in ("total", "predictor0", "predictor1", "predictor2", "5/5"))
    if not use_bar:
        assert "s/it" in text and "ETA" in text


def test_losses_are_summed_by_predictor_in_the_order_of_their_numbers():
    metrics = {"loss_cls/predictor0": 1.0, "loss_l1/predictor0": 2.0, "loss_cls/res2": 5.0}
    metrics |= {"loss_cls/predictor10": 4.0, "loss_cls/predictor2": 3.0, "lr": 9.0}
    expected = {"predictor0": 3.0, "predictor2": 3.0, "predictor10": 4.0, "res2": 5.0}
    assert list(loss_by_block(metrics).items()) == list(expected.items())


def test_precision_choices():
    cpu = torch.device("cpu")
    assert resolve_amp_dtype(False, "auto", cpu) is None
    assert resolve_amp_dtype(True, "bfloat16", cpu) == torch.bfloat16
    assert resolve_amp_dtype(True, "auto", cpu) in (None, torch.bfloat16)
    with pytest.raises(ValueError, match="float16 needs a CUDA device"):
        resolve_amp_dtype(True, "float16", cpu)


class Collector(DatasetEvaluator):
    """Keeps the instances."""

    def reset(self):
        self.found = []

    def process(self, inputs, outputs):
        self.found += [output["instances"] for output in outputs]

    def evaluate(self):
        return {"images": len(self.found)}


@pytest.mark.parametrize("architecture", ["FlowDetector", "CascadeDetector"])
def test_detections_of_bfloat16_are_finite_float32(make_model, make_input, architecture):
    cfg = tiny_cfg()
    with inference_autocast(cfg):
        assert not torch.is_autocast_enabled("cpu")
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "bfloat16"
    model, collector, dtypes = make_model(architecture), Collector(), set()
    model.predictors[0].class_logits.register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    with inference_autocast(cfg):
        inference_on_dataset(model, [[make_input("a"), make_input("b")]], collector)
    assert dtypes == {torch.bfloat16}
    for found in collector.found:
        assert found.pred_boxes.tensor.dtype == found.scores.dtype == torch.float32
        assert len(found) and found.pred_boxes.tensor.isfinite().all() and found.scores.isfinite().all()
    assert model.training and not torch.is_autocast_enabled("cpu")


class Echo(torch.nn.Module):
    def forward(self, batch):
        return [{"instances": item} for item in batch]


@pytest.mark.parametrize("use_bar", [True, False])
def test_progress_of_an_evaluation_is_shown_once(use_bar, capsys, caplog):
    log = logging.getLogger(inference_on_dataset.__module__)
    level = log.level
    with caplog.at_level(logging.INFO), evaluation_bar([[1], [2], [3]], "some_val", use_bar) as loader:
        assert inference_on_dataset(Echo(), loader, Collector()) == {"images": 3}
    bar, lines = capsys.readouterr().err, [r for r in caplog.records if r.module == log.name.split(".")[-1]]
    assert ("some_val" in bar) == use_bar and bool(lines) != use_bar
    with pytest.raises(KeyError), evaluation_bar([[1]], "some_val", use_bar):
        raise KeyError("broken off")
    assert log.level == level
