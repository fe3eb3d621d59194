"""The config of a detector small enough for tests."""

import torch

import dfm_d2.registry  # noqa: F401  (registers the meta-architectures)
from dfm_d2.config import add_dfm_config
from dfm_d2.framework import get_cfg


def tiny_cfg(**dfm):
    """A ResNet FPN detector of 16 channels; keyword arguments are keys of MODEL.DFM (dots as __).

    Of the bottleneck kind, as only its channels may be chosen: a ResNet-18 has 11 million parameters.
    """
    cfg = get_cfg()
    add_dfm_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "FlowDetector"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
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


def spread(model):
    """Untrained class logits are all alike; spread them, so that detections differ. Returns the model.

    By as much at any width: far larger logits have the score 1.0 alike, and their order is anyone's.
    """
    for head in model.predictors:
        spread_of_one = 4 / head.class_logits.in_features**0.5
        torch.nn.init.normal_(head.class_logits.weight, std=spread_of_one)
        torch.nn.init.normal_(head.box_answer.weight, std=0.2 * spread_of_one)
    return model
