"""ResNet-18, 34, 50 and 101 under Detectron2's parameter names.

Shapes: images (B, C, H, W); the map res<k> has stride 2^k.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from dfm_d2.framework._builtin.backbone import Backbone
from dfm_d2.framework._builtin.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str, **kwargs) -> Conv2d:
    """A convolution without bias, with its norm, and "same" padding unless given."""
    kwargs.setdefault("padding", kernel_size // 2)
    return Conv2d(
        in_channels, out_channels, kernel_size, bias=False, norm=get_norm(norm, out_channels), **kwargs
    )


def _initialise(*convs: Conv2d | None) -> None:
    """He initialisation, fan out; after all convolutions of a block exist, and in Detectron2's order, so that
    a seed gives the same weights with both providers."""
    for conv in convs:
        if conv is not None:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


class _Block(nn.Module):
    """A part of the network that can be frozen; `stride` is its output's relative to its input's."""

    def __init__(self, out_channels: int, stride: int):
        super().__init__()
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self) -> None:
        """Take no gradient any more, and turn batch norms into fixed ones."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)


class Stem(_Block):
    """7x7 convolution, then max pooling: stride 4."""

    def __init__(self, in_channels: int, out_channels: int, norm: str):
        super().__init__(out_channels, stride=4)
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)
        _initialise(self.conv1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class BasicBlock(_Block):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and 34)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str):
        super().__init__(out_channels, stride)
        self.shortcut = (
            _conv(in_channels, out_channels, 1, norm, stride=stride) if in_channels != out_channels else None
        )
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = _conv(out_channels, out_channels, 3, norm)
        _initialise(self.conv1, self.conv2, self.shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv2(F.relu_(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BottleneckBlock(_Block):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50 and 101)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: str,
        *,
        bottleneck_channels: int,
        num_groups: int,
        stride_in_1x1: bool,
        dilation: int,
    ):
        super().__init__(out_channels, stride)
        self.shortcut = (
            _conv(in_channels, out_channels, 1, norm, stride=stride) if in_channels != out_channels else None
        )
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
        self.conv2 = _conv(
            bottleneck_channels,
            bottleneck_channels,
            3,
            norm,
            stride=stride_3x3,
            padding=dilation,
            groups=num_groups,
            dilation=dilation,
        )
        self.conv3 = _conv(bottleneck_channels, out_channels, 1, norm)
        _initialise(self.conv1, self.conv2, self.conv3, self.shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class ResNet(Backbone):
    """A stem and the stages res2 to res5, of which those after the last of `out_features` are left out."""

    def __init__(self, stem: Stem, stages: list[list[_Block]], out_features: list[str], freeze_at: int = 0):
        """`freeze_at` 1 freezes the stem, 2 also res2, and so on. Raises ValueError for unknown features."""
        super().__init__()
        known = ["stem"] + [f"res{index}" for index in range(2, 2 + len(stages))]
        unknown = [name for name in out_features if name not in known]
        if unknown or not out_features:
            raise ValueError(f"MODEL.RESNETS.OUT_FEATURES is {out_features}: choose from {', '.join(known)}.")
        self.stem = stem
        self._out_features = list(out_features)
        self._out_feature_strides = {"stem": stem.stride}
        self._out_feature_channels = {"stem": stem.out_channels}
        self.stage_names = tuple(known[1 : 1 + max(known.index(name) for name in out_features)])
        stride = stem.stride
        for name, blocks in zip(self.stage_names, stages):
            self.add_module(name, nn.Sequential(*blocks))
            stride *= math.prod(block.stride for block in blocks)
            self._out_feature_strides[name] = stride
            self._out_feature_channels[name] = blocks[-1].out_channels
        self._freeze(freeze_at)

    def _freeze(self, freeze_at: int) -> None:
        if freeze_at >= 1:
            self.stem.freeze()
        for index, name in enumerate(self.stage_names, start=2):
            if freeze_at >= index:
                for block in getattr(self, name):
                    block.freeze()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps of images (B, C, H, W), by name."""
        assert x.dim() == 4, f"images must be (B, C, H, W), not {tuple(x.shape)}"
        outputs = {}
        x = self.stem(x)
        if "stem" in self._out_features:
            outputs["stem"] = x
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs


def _make_stage(cfg, index: int, in_channels: int, out_channels: int) -> list[_Block]:
    """The blocks of stage res<index>; only its first block changes stride and channels."""
    resnets = cfg.MODEL.RESNETS
    dilation = resnets.RES5_DILATION if index == 5 else 1
    first_stride = 1 if index == 2 or dilation == 2 else 2
    blocks = []
    for number in range(BLOCKS_PER_STAGE[resnets.DEPTH][index - 2]):
        block_in = in_channels if number == 0 else out_channels
        stride = first_stride if number == 0 else 1
        if resnets.DEPTH < 50:
            blocks.append(BasicBlock(block_in, out_channels, stride, resnets.NORM))
            continue
        bottleneck = BottleneckBlock(
            block_in,
            out_channels,
            stride,
            resnets.NORM,
            bottleneck_channels=resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2 ** (index - 2),
            num_groups=resnets.NUM_GROUPS,
            stride_in_1x1=resnets.STRIDE_IN_1X1,
            dilation=dilation,
        )
        blocks.append(bottleneck)
    return blocks


def _check(resnets) -> None:
    if resnets.DEPTH not in BLOCKS_PER_STAGE:
        depths = ", ".join(str(depth) for depth in BLOCKS_PER_STAGE)
        raise ValueError(f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}: choose from {depths}.")
    if resnets.RES5_DILATION not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION is {resnets.RES5_DILATION}: choose 1 or 2.")
    if resnets.DEPTH < 50:
        for key, needed in (("RES2_OUT_CHANNELS", 64), ("RES5_DILATION", 1), ("NUM_GROUPS", 1)):
            if resnets[key] != needed:
                raise ValueError(
                    f"MODEL.RESNETS.{key} must be {needed} for depth 18 and 34, not {resnets[key]}."
                )


def build_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet that `cfg.MODEL.RESNETS` and `cfg.MODEL.BACKBONE.FREEZE_AT` describe.

    Raises ValueError, naming the key, for values that Detectron2 has not either.
    """
    resnets = cfg.MODEL.RESNETS
    _check(resnets)
    stem = Stem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    stages = []
    in_channels = resnets.STEM_OUT_CHANNELS
    for index in range(2, 6):
        out_channels = resnets.RES2_OUT_CHANNELS * 2 ** (index - 2)
        stages.append(_make_stage(cfg, index, in_channels, out_channels))
        in_channels = out_channels
    return ResNet(stem, stages, resnets.OUT_FEATURES, cfg.MODEL.BACKBONE.FREEZE_AT)
