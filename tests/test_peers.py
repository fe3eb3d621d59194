"""The detectors of others beside this one: they learn by our trainer, and what is done is not done again."""

import sys
import types

import pytest
import test_benchmark_rows as rows  # which finds benchmarks/
import torch
from tiny_model import tiny_cfg

import peers  # isort: skip
from dfm_d2.detection.data.shapes import write_shapes
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.local_update import build_update


@pytest.mark.parametrize("name", ["TorchvisionFCOS", "TorchvisionRetinaNet", "TorchvisionFasterRCNN"])
def test_a_peer_learns_a_batch_by_our_trainer(name, make_input):
    cfg, batch, losses = tiny_cfg(), [make_input("a"), make_input("b", ())], []
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.FPN.OUT_CHANNELS, cfg.SOLVER.BASE_LR = name, 32, 0.002
    torch.manual_seed(0)
    model = rows.build_model(cfg)
    update, optimizer = build_update("joint"), build_block_optimizer(cfg, model)
    for iteration in range(15):
        found = update.step(model, model.prepare(batch, iteration), optimizer)
        losses.append(sum(value.item() for key, value in found.items() if key.startswith("loss")))
    assert max(losses[-3:]) < 0.8 * losses[0]
    found = model.eval()(batch)[0]["instances"]
    assert found.image_size == (96, 128) and 0 < len(found) <= 100
    assert set(found.pred_classes.tolist()) <= {0, 1, 2}


def test_all_columns_are_there_and_a_resume_does_nothing_again(tmp_path, monkeypatch):
    def train(command, **_):
        return types.SimpleNamespace(returncode=rows.runs.main(*command[2:]))

    monkeypatch.setattr(rows.runs, "ROOT", tmp_path)
    monkeypatch.setattr(rows.runs, "subprocess", types.SimpleNamespace(run=train))
    monkeypatch.setattr(rows.harness, "alone", lambda function, *arguments: function(*arguments))
    for name, value in {"RESULTS": tmp_path, "TUNING": 1, "RATES": (1.0, 3.0)}.items():
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr(rows.harness, "RESULTS", tmp_path)
    write_shapes(tmp_path / "data", num_train=5, num_val=8, size=128, seed=0)
    opts = "MODEL.FPN.OUT_CHANNELS 64 MODEL.DFM.HEAD.HIDDEN_DIM 64 SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2"
    opts += f" MODEL.BACKBONE.NAME build_resnet_fpn_backbone DATASETS.VOC_ROOT {tmp_path / 'data'}"
    words = "peers --save --name tiny --sets shapes --methods fcos --opts".split()
    monkeypatch.setattr(sys, "argv", [*words, *rows.TINY, *opts.split()])
    peers.main()
    tuned = {("tune", "held-out AP", x) for x in ("0.001", "0.003")}
    scores = {("equal iterations", m, x) for m in ("AP50", "AP") for x in "12"}
    scores |= {("equal minutes", m, "flow") for m in ("AP50", "AP")}
    metrics, saved = ("time", "time / flow", "process peak"), rows.load_rows("tiny")
    costs = {(mode, m, x) for mode, x in zip(["train", *["inference"] * 2], "218") for m in metrics}
    for method in ("flow", "fcos"):
        assert {
            (r.mode, r.metric, r.x_value) for r in saved if r.provider == method
        } == tuned | scores | costs
    assert (tmp_path / "tiny.png").exists()
    monkeypatch.setattr(rows.runs, "subprocess", None)
    monkeypatch.setattr(rows.harness, "alone", None)
    peers.main()
    assert set(rows.load_rows("tiny")) == set(saved)
