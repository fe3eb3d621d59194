"""A tiny checkpoint of our own and its config file."""

import pytest
import torch
from tiny_model import spread, tiny_cfg

from dfm_d2.detection import FlowPredictor
from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.framework import build_model


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(config file, weight file)"""
    folder = tmp_path_factory.mktemp("trained")
    cfg = tiny_cfg()
    cfg.INPUT.FORMAT, cfg.OUTPUT_DIR = "RGB", str(folder)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 160
    cfg.MODEL.DFM.NUM_CLASSES = 3
    torch.manual_seed(0)
    model, names = spread(build_model(cfg)), ("circle", "square", "star")
    SafeCheckpointer(model, str(folder), cfg=cfg, class_names=names).save("model_final")
    cfg.MODEL.DFM.NUM_CLASSES = 0  # as in the configs: the checkpoint knows
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "config.yaml"), str(folder / "model_final.pth")


@pytest.fixture(scope="session")
def predictor(trained):
    return FlowPredictor.from_files(*trained)
