"""The backbone's base class, and the backbone that a config names."""

from abc import ABCMeta, abstractmethod

import torch
from torch import nn

from dfm_d2.framework._builtin.layers import ShapeSpec


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
