"""How an evaluation runs: its precision and its progress."""

import logging

import pytest
import torch

from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.precision import inference_autocast
from dfm_d2.engine.progress import evaluation_bar
from dfm_d2.engine.setup import load_config
from dfm_d2.framework import DatasetEvaluator, inference_on_dataset


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
    cfg = load_config(
        DETECTION, "", ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"]
    )
    model, collector = make_model(architecture), Collector()
    dtypes = set()
    model.predictors[0].class_logits.register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    with inference_autocast(cfg):
        inference_on_dataset(model, [[make_input("a"), make_input("b")]], collector)
    assert dtypes == {torch.bfloat16}
    for found in collector.found:
        assert found.pred_boxes.tensor.dtype == found.scores.dtype == torch.float32
        assert len(found) and found.pred_boxes.tensor.isfinite().all() and found.scores.isfinite().all()
    assert model.training and not torch.is_autocast_enabled("cpu")


def test_without_amp_nothing_is_cast():
    with inference_autocast(load_config(DETECTION, "", ["MODEL.DEVICE", "cpu"])):
        assert not torch.is_autocast_enabled("cpu")


class Echo(torch.nn.Module):
    def forward(self, batch):
        return [{"instances": item} for item in batch]


@pytest.mark.parametrize("use_bar", [True, False])
def test_progress_is_shown_once(use_bar, capsys, caplog):
    log = logging.getLogger(inference_on_dataset.__module__)
    level = log.level
    with caplog.at_level(logging.INFO), evaluation_bar([[1], [2], [3]], "some_val", use_bar) as loader:
        assert inference_on_dataset(Echo(), loader, Collector()) == {"images": 3}
    bar, lines = capsys.readouterr().err, [r for r in caplog.records if r.name == log.name]
    assert ("some_val" in bar) == use_bar and bool(lines) != use_bar
    assert log.level == level


def test_the_log_speaks_again_after_an_error():
    log = logging.getLogger(inference_on_dataset.__module__)
    level = log.level
    with pytest.raises(KeyError), evaluation_bar([[1]], "some_val", use_bar=True):
        raise KeyError("broken off")
    assert log.level == level
