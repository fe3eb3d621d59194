"""Detectron2's own trainers train our detector, by the losses of the joint update."""

import copy
import os

import pytest
import torch
from tiny_model import tiny_cfg
from toy_model import make_trainer, toy_config

from dfm_d2.detection import register
from dfm_d2.detection.data.shapes import write_shapes
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.framework import build_model

pytestmark = [
    pytest.mark.d2,
    pytest.mark.usefixtures("detectron2"),
    pytest.mark.skipif("builtin" in os.environ.get("DFM_FRAMEWORK", ""), reason="DFM_FRAMEWORK is builtin"),
]


def test_simple_trainer_trains_as_the_joint_update_does(make_model, make_input):
    from detectron2.engine import SimpleTrainer

    model = make_model().train()
    twin = copy.deepcopy(model)
    batches = [[make_input(f"{step}a"), make_input(f"{step}b", boxes=())] for step in range(3)]
    trainer = SimpleTrainer(model, iter(batches), build_block_optimizer(toy_config(), model))
    trainer.train(0, 3)
    ours = make_trainer(twin, lambda position: iter(batches), "joint", 2, WARMUP_ITERS=0)
    ours.train(0, 3)
    theirs, mine = trainer.storage.histories(), ours.storage.histories()
    losses = [key for key in mine if key.startswith("loss")]
    assert len(losses) == 9
    for key in [*losses, "total_loss"]:
        expected = [value for value, _ in mine[key].values()]
        assert [value for value, _ in theirs[key].values()] == pytest.approx(expected, rel=1e-5), key
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_default_trainer_trains_after_one_call(tmp_path, optimizer):
    from detectron2.engine import DefaultTrainer

    class Trainer(DefaultTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            if cfg.SOLVER.OPTIMIZER == "adamw":
                return build_block_optimizer(cfg, model)
            return super().build_optimizer(cfg, model)

    write_shapes(tmp_path / "shapes", num_train=6, num_val=2, size=64, seed=0)
    cfg = tiny_cfg(NUM_CLASSES=0)
    cfg.merge_from_list(["DATASETS.VOC_ROOT", str(tmp_path / "shapes"), "OUTPUT_DIR", str(tmp_path / "out")])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("voc_root_train",), ("voc_root_val",)
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 0, 2, 2
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR = optimizer, 1e-4
    classes = register(cfg)
    assert len(classes) == cfg.MODEL.DFM.NUM_CLASSES > 0
    before = build_model(cfg).state_dict()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (tmp_path / "out" / "model_final.pth").is_file()
    assert trainer.storage.history("total_loss").latest() > 0
    assert trainer.model.state_dict().keys() == before.keys()
    assert type(cfg).__module__ == "detectron2.config.config"
    cfg.merge_from_file("configs/voc_flow_r50.yaml")  # by Detectron2's own reader
    assert cfg.MODEL.DFM.NUM_PREDICTORS == 6
