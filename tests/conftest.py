"""A detector small enough for tests."""

# ruff: noqa: E402
import os

import torch

# Where there is no GPU, Triton's interpreter runs the kernels. Triton reads this when it is first imported,
# which other packages than ours do, too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import dfm_d2.modeling  # noqa: F401  (registers the meta-architectures)
from dfm_d2.config import add_dfm_config
from dfm_d2.framework import Boxes, Instances, build_model, get_cfg


def tiny_cfg(**dfm):
    """A ResNet-18 FPN detector of 16 channels; keyword arguments are keys of MODEL.DFM (dots as __)."""
    cfg = get_cfg()
    add_dfm_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "FlowDetector"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.DFM.NUM_CLASSES = 3
    cfg.MODEL.DFM.NUM_PREDICTORS = 3
    cfg.MODEL.DFM.NUM_PROPOSALS = 12
    head = cfg.MODEL.DFM.HEAD
    head.HIDDEN_DIM, head.NUM_HEADS, head.FEEDFORWARD_DIM, head.DYNAMIC_DIM = 16, 2, 32, 8
    head.POOLER_RESOLUTION = 3
    for key, value in dfm.items():
        node = cfg.MODEL.DFM
        *path, last = key.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return cfg


@pytest.fixture
def make_model():
    def make(meta_architecture="FlowDetector", seed=0, **dfm):
        cfg = tiny_cfg(**dfm)
        cfg.MODEL.META_ARCHITECTURE = meta_architecture
        torch.manual_seed(seed)
        model = build_model(cfg)
        # Untrained class logits are all alike; spread them, so that detections differ.
        for head in model.predictors:
            torch.nn.init.normal_(head.class_logits.weight, std=1.0)
            torch.nn.init.normal_(head.box_answer.weight, std=0.2)
        return model

    return make


@pytest.fixture
def make_input():
    def make(image_id="a", boxes=((4.0, 6.0, 30.0, 40.0), (20.0, 8.0, 60.0, 44.0)), size=(48, 64), seed=None):
        generator = torch.Generator().manual_seed(sum(map(ord, str(image_id))) if seed is None else seed)
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(boxes)) % 3
        return {
            "file_name": f"{image_id}.jpg",
            "image_id": image_id,
            "height": size[0] * 2,
            "width": size[1] * 2,
            "image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8),
            "instances": instances,
        }

    return make
