"""The backbone's base class, the registries and the builders."""

from abc import ABCMeta, abstractmethod

import torch
from fvcore.common.registry import Registry
from torch import nn

from dfm_d2.framework._builtin.layers import ShapeSpec

# Called as (cfg, input_shape: ShapeSpec) and returning a Backbone.
BACKBONE_REGISTRY = Registry("BACKBONE")
# Called as (cfg) and returning an nn.Module, the whole model.
META_ARCH_REGISTRY = Registry("META_ARCH")


class Backbone(nn.Module, metaclass=ABCMeta):
    """From images (B, C, H, W) to named feature maps."""

    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    @abstractmethod
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps by name."""

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be a multiple of this; 0: any size."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """More wishes for ImageList.from_tensors; none by default."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map of `forward`."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }


def build_backbone(cfg, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build the backbone called `cfg.MODEL.BACKBONE.NAME`; raises KeyError where none is registered so."""
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, input_shape)
    assert isinstance(backbone, Backbone), f"{cfg.MODEL.BACKBONE.NAME} did not build a Backbone"
    return backbone


def build_model(cfg) -> nn.Module:
    """Build the model called `cfg.MODEL.META_ARCHITECTURE`, on `cfg.MODEL.DEVICE`; loads no weights."""
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    model.to(torch.device(cfg.MODEL.DEVICE))
    return model
