"""Feature pyramid network on a ResNet, under Detectron2's parameter names, and the backbone of a config.

Shapes: images (B, C, H, W); the map p<k> has stride 2^k and `out_channels` channels.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dfm_d2.framework._builtin.backbone import Backbone
from dfm_d2.framework._builtin.layers import Conv2d, ShapeSpec, get_norm
from dfm_d2.framework._builtin.resnet import build_resnet_backbone


class FPN(Backbone):
    """Lateral 1x1 convolutions, a top-down sum or mean, 3x3 output convolutions; the last map subsampled."""

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: list[str],
        out_channels: int,
        norm: str = "",
        fuse_type: str = "sum",
    ):
        """Raises ValueError where the strides of `in_features` do not double and for other `fuse_type`s."""
        super().__init__()
        shapes = bottom_up.output_shape()
        missing = [name for name in in_features if name not in shapes]
        if missing or not in_features:
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES is {list(in_features)}: choose from MODEL.RESNETS.OUT_FEATURES, "
                f"{', '.join(shapes)}."
            )
        strides = [shapes[name].stride for name in in_features]
        if any(second != 2 * first for first, second in zip(strides, strides[1:])):
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES have strides {strides}: each must be twice the one before."
            )
        if fuse_type not in ("sum", "avg"):
            raise ValueError(f"MODEL.FPN.FUSE_TYPE is {fuse_type!r}: choose 'sum' or 'avg'.")
        self.in_features = tuple(in_features)
        self._levels = [stride.bit_length() - 1 for stride in strides]
        self._fuse_type = fuse_type
        self._size_divisibility = strides[-1]
        for level, name in zip(self._levels, in_features):
            lateral = _conv(shapes[name].channels, out_channels, 1, norm)
            output = _conv(out_channels, out_channels, 3, norm)
            _initialise(lateral)
            _initialise(output)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
        self.bottom_up = bottom_up
        self._out_features = [f"p{level}" for level in [*self._levels, self._levels[-1] + 1]]
        self._out_feature_strides = {name: 2 ** int(name[1:]) for name in self._out_features}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": 0}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps by name, finest first, of images (B, C, H, W) padded to `size_divisibility`."""
        bottom_up = self.bottom_up(x)
        outputs = []
        inner = None
        for level, name in reversed(list(zip(self._levels, self.in_features))):
            lateral = getattr(self, f"fpn_lateral{level}")(bottom_up[name])
            if inner is None:
                inner = lateral
            else:
                inner = lateral + F.interpolate(inner, scale_factor=2.0, mode="nearest")
                if self._fuse_type == "avg":
                    inner = inner / 2
            outputs.insert(0, getattr(self, f"fpn_output{level}")(inner))
        outputs.append(F.max_pool2d(outputs[-1], kernel_size=1, stride=2))
        return dict(zip(self._out_features, outputs))


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str) -> nn.Module:
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=norm == "",
        norm=get_norm(norm, out_channels),
    )


def _initialise(conv: nn.Conv2d) -> None:
    """Uniform in +-sqrt(3 / fan_in) (what Caffe2 calls Xavier), bias zero; after both convolutions of a level
    exist, as in Detectron2, so that a seed gives the same weights."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def build_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build the FPN that `cfg.MODEL.FPN` describes on the ResNet of `cfg.MODEL.RESNETS`."""
    fpn = cfg.MODEL.FPN
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return FPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, norm=fpn.NORM, fuse_type=fpn.FUSE_TYPE)


def build_backbone(cfg, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build the backbone called `cfg.MODEL.BACKBONE.NAME`; raises KeyError for an unknown name."""
    builders = {
        "build_resnet_backbone": build_resnet_backbone,
        "build_resnet_fpn_backbone": build_resnet_fpn_backbone,
    }
    return builders[cfg.MODEL.BACKBONE.NAME](
        cfg, input_shape or ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    )
