"""The config of a detector small enough for tests."""

import functools
from operator import getitem

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
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_resnet_fpn_backbone", 0
    resnets, fpn, head = cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.DFM.HEAD
    resnets.DEPTH, resnets.NORM = 50, "BN"
    resnets.STEM_OUT_CHANNELS = resnets.WIDTH_PER_GROUP = 8
    resnets.RES2_OUT_CHANNELS = fpn.OUT_CHANNELS = 16
    resnets.OUT_FEATURES, fpn.IN_FEATURES = (["res2", "res3", "res4", "res5"] for _ in range(2))
    cfg.MODEL.DFM.NUM_CLASSES, cfg.MODEL.DFM.NUM_PREDICTORS, cfg.MODEL.DFM.NUM_PROPOSALS = 3, 3, 12
    head.HIDDEN_DIM, head.NUM_HEADS, head.FEEDFORWARD_DIM, head.DYNAMIC_DIM = 16, 2, 32, 8
    head.POOLER_RESOLUTION = 3
    for key, value in dfm.items():
        *path, last = key.split("__")
        functools.reduce(getitem, path, cfg.MODEL.DFM)[last] = value
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
