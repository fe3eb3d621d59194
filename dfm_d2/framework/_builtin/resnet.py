"""ResNet-18, 34, 50 and 101 under Detectron2's parameter names.

Shapes: images (B, C, H, W); the map res<k> has stride 2^k.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dfm_d2.framework._builtin.layers import Backbone, Conv2d, FrozenBatchNorm2d, ShapeSpec

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def _init(conv: Conv2d) -> None:
    """Weights by He et al. (2015); a convolution of a ResNet has no bias."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


class Stem(nn.Module):
    """7x7 convolution, then max pooling: stride 4."""

    def __init__(self, in_channels: int, out_channels: int, norm: str):
        super().__init__()
        self.conv1 = Conv2d(in_channels, out_channels, 7, norm, stride=2, bias=False)
        _init(self.conv1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class ResidualBlock(nn.Module):
    """Convolutions in a row with ReLU between them, beside a shortcut; for depth 18 and 34 two of 3x3, else
    1x1, 3x3 and 1x1."""

    def __init__(self, resnets, in_channels: int, out_channels: int, stride: int):
        """resnets: the section MODEL.RESNETS of a config."""
        super().__init__()
        if resnets.DEPTH < 50:
            # Output channels, kernel size, stride and groups.
            layout = [(out_channels, 3, stride, 1), (out_channels, 3, 1, 1)]
        else:
            groups = resnets.NUM_GROUPS
            inner = groups * resnets.WIDTH_PER_GROUP * out_channels // resnets.RES2_OUT_CHANNELS
            first, second = (stride, 1) if resnets.STRIDE_IN_1X1 else (1, stride)
            layout = [(inner, 1, first, 1), (inner, 3, second, groups), (out_channels, 1, 1, 1)]
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1, resnets.NORM, stride=stride, bias=False)
        self._convs: list[str] = []
        for number, (channels, size, conv_stride, groups) in enumerate(layout, start=1):
            self._convs.append(f"conv{number}")
            conv = Conv2d(
                in_channels, channels, size, resnets.NORM, stride=conv_stride, groups=groups, bias=False
            )
            self.add_module(f"conv{number}", conv)
            in_channels = channels
        # In Detectron2's order, after all convolutions exist: a seed gives the same weights.
        for name in [*self._convs, "shortcut"]:
            if getattr(self, name) is not None:
                _init(getattr(self, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(x)
        for name in self._convs[1:]:
            out = getattr(self, name)(F.relu_(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class ResNet(Backbone):
    """A stem and the stages res2 to res5, of which those after the last of OUT_FEATURES are left out."""

    def __init__(self, resnets, freeze_at: int, in_channels: int):
        """resnets: the section MODEL.RESNETS of a config. freeze_at 1 freezes the stem, 2 also res2, ...

        Raises ValueError, naming the key, for values that Detectron2 has not either.
        """
        super().__init__()
        _check(resnets)
        known = ["stem", "res2", "res3", "res4", "res5"]
        if not resnets.OUT_FEATURES or not set(resnets.OUT_FEATURES) <= set(known):
            raise ValueError(
                f"MODEL.RESNETS.OUT_FEATURES is {resnets.OUT_FEATURES}: choose from {', '.join(known)}."
            )
        self._out_features = list(resnets.OUT_FEATURES)
        self._out_feature_strides = {name: 4 * 2**place for place, name in enumerate(known[1:])} | {"stem": 4}
        self._out_feature_channels = {"stem": resnets.STEM_OUT_CHANNELS}
        self.stem = Stem(in_channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
        self._stages = known[1 : 1 + max(map(known.index, self._out_features))]
        in_channels, channels, stride = resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS, 1
        for name, count in zip(self._stages, BLOCKS_PER_STAGE[resnets.DEPTH]):
            blocks = [ResidualBlock(resnets, in_channels, channels, stride)]
            blocks += [ResidualBlock(resnets, channels, channels, 1) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(*blocks))
            self._out_feature_channels[name] = channels
            in_channels, channels, stride = channels, 2 * channels, 2
        for name in ["stem", *self._stages][: max(freeze_at, 0)]:
            getattr(self, name).requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(getattr(self, name))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps of images (B, C, H, W), by name."""
        outputs = {}
        for name in ["stem", *self._stages]:
            x = getattr(self, name)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs


def _check(resnets) -> None:
    if resnets.DEPTH not in BLOCKS_PER_STAGE:
        depths = ", ".join(map(str, BLOCKS_PER_STAGE))
        raise ValueError(f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}: choose from {depths}.")
    for key, needed in (("RES2_OUT_CHANNELS", 64), ("NUM_GROUPS", 1)):
        if resnets.DEPTH < 50 and resnets[key] != needed:
            raise ValueError(f"MODEL.RESNETS.{key} must be {needed} for depth 18 and 34, not {resnets[key]}.")


def build_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet that `cfg.MODEL.RESNETS` and `cfg.MODEL.BACKBONE.FREEZE_AT` describe."""
    return ResNet(cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.FREEZE_AT, input_shape.channels)
