"""The trainer's errors and state, progress, metrics.json and precision."""

import io
import json
import re

import pytest
import torch
from tiny_model import tiny_cfg
from toy_model import make_toy, make_trainer

from dfm_d2.engine.hooks import Progress, loss_by_block
from dfm_d2.engine.metrics import cut_back, flatten, read_metrics
from dfm_d2.engine.precision import inference_autocast, resolve_amp_dtype
from dfm_d2.framework import PROVIDER
from dfm_d2.local_update import NonFiniteLossError


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


def test_a_resume_with_another_number_of_threads_is_warned_of(caplog):
    trainer = make_trainer(make_toy())
    trainer.train(0, 1)
    state = trainer.state_dict()
    for threads, warned in ((state["threads"], False), (state["threads"] + 1, True)):
        trainer.load_state_dict({**state, "threads": threads})
        assert ("equal to rounding only" in caplog.text) == warned


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


def test_metrics_are_flat_and_without_nan_and_losses_summed_by_predictor_in_the_order_of_their_numbers():
    flat = flatten({"bbox": {"AP": 1, "AP-cat": float("nan")}, "other": {"bbox": {"AP": 2.0}}})
    assert flat == {"bbox/AP": 1.0, "other/bbox/AP": 2.0}
    metrics = {"loss_cls/predictor0": 1.0, "loss_l1/predictor0": 2.0, "loss_cls/res2": 5.0}
    metrics |= {"loss_cls/predictor10": 4.0, "loss_cls/predictor2": 3.0, "lr": 9.0}
    expected = {"predictor0": 3.0, "predictor2": 3.0, "predictor10": 4.0, "res2": 5.0}
    assert list(loss_by_block(metrics).items()) == list(expected.items())


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_tells_the_loss_of_each_predictor(caplog, monkeypatch, is_terminal):
    trainer, stderr = make_trainer(make_toy()), io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    trainer.register_hooks([Progress(2)])
    with caplog.at_level("INFO", logger="dfm_d2.engine.hooks"):
        trainer.train(0, 5)
    lines = [record.message for record in caplog.records if record.name == "dfm_d2.engine.hooks"]
    number = r"\d+\.\d{3}"
    losses = "".join(rf"  {name} {number}" for name in ("total", "predictor0", "predictor1", "predictor2"))
    assert len(lines) == 3 and re.fullmatch(rf"5/5{losses}  {number} s/it  ETA 0:00:00", lines[-1])
    bar = stderr.getvalue()
    assert re.search(rf"5/5 .*total {number}", bar) if is_terminal else not bar


def test_precision_choices():
    cpu = torch.device("cpu")
    assert resolve_amp_dtype(False, "auto", cpu) is None
    assert resolve_amp_dtype(True, "bfloat16", cpu) == torch.bfloat16
    assert resolve_amp_dtype(True, "auto", cpu) in (None, torch.bfloat16)
    with pytest.raises(ValueError, match="float16 needs a CUDA device"):
        resolve_amp_dtype(True, "float16", cpu)


@pytest.mark.parametrize("architecture", ["FlowDetector", "CascadeDetector"])
def test_detections_of_bfloat16_are_finite_float32(make_model, make_input, architecture):
    cfg = tiny_cfg()
    with inference_autocast(cfg):
        assert not torch.is_autocast_enabled("cpu")
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "bfloat16"
    model, dtypes = make_model(architecture).eval(), set()
    model.predictors[0].class_logits.register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    with inference_autocast(cfg), torch.no_grad():
        answers = model([make_input("a"), make_input("b")])
    assert dtypes == {torch.bfloat16} and not torch.is_autocast_enabled("cpu")
    for found in (answer["instances"] for answer in answers):
        assert found.pred_boxes.tensor.dtype == found.scores.dtype == torch.float32
        assert len(found) and found.pred_boxes.tensor.isfinite().all() and found.scores.isfinite().all()
