"""Feature pyramid network on a ResNet, under Detectron2's parameter names, and the backbone of a config.

Shapes: images (B, C, H, W); the map p<k> has stride 2^k and `out_channels` channels.
"""

import torch
from fvcore.common.registry import Registry
from torch import nn
from torch.nn import functional as F

from dfm_d2.framework._builtin.layers import Backbone, Conv2d, ShapeSpec
from dfm_d2.framework._builtin.resnet import build_resnet_backbone

# Called as (cfg, input_shape) and returning a Backbone.
BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.register(build_resnet_backbone)


class LastLevelMaxPool(nn.Module):
    """One level more, of twice the stride: every second pixel of the last."""

    num_levels = 1

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [F.max_pool2d(x, kernel_size=1, stride=2)]


class FPN(Backbone):
    """Lateral 1x1 convolutions, a top-down sum or mean, 3x3 output convolutions."""

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: list[str],
        out_channels: int,
        norm: str = "",
        top_block: LastLevelMaxPool | None = None,
        fuse_type: str = "sum",
    ):
        """top_block: makes more levels of the last one.

        Raises ValueError where the strides of `in_features` do not double and for other `fuse_type`s.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        shapes = bottom_up.output_shape()
        if not self.in_features or not set(self.in_features) <= set(shapes):
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES is {list(self.in_features)}: choose from MODEL.RESNETS.OUT_FEATURES, "
                f"{', '.join(shapes)}."
            )
        strides = [shapes[name].stride for name in self.in_features]
        if any(second != 2 * first for first, second in zip(strides, strides[1:])):
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES have strides {strides}: each must be twice the one before."
            )
        if fuse_type not in ("sum", "avg"):
            raise ValueError(f"MODEL.FPN.FUSE_TYPE is {fuse_type!r}: choose 'sum' or 'avg'.")
        self._averages = fuse_type == "avg"
        self._levels = [stride.bit_length() - 1 for stride in strides]
        self.size_divisibility = strides[-1]
        for level, name in zip(self._levels, self.in_features):
            bias = norm == ""
            lateral = Conv2d(shapes[name].channels, out_channels, 1, norm, bias=bias)
            output = Conv2d(out_channels, out_channels, 3, norm, bias=bias)
            # After both exist, as in Detectron2, so that a seed gives the same weights.
            for conv in (lateral, output):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                if bias:
                    nn.init.zeros_(conv.bias)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
        self.bottom_up, self.top_block = bottom_up, top_block
        more = 0 if top_block is None else top_block.num_levels
        self._out_feature_strides = {
            f"p{k}": 2**k for k in range(self._levels[0], self._levels[-1] + more + 1)
        }
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps by name, finest first, of images (B, C, H, W) padded to `size_divisibility`."""
        bottom_up = self.bottom_up(x)
        outputs = []
        inner = None
        for level, name in reversed(list(zip(self._levels, self.in_features))):
            lateral = getattr(self, f"fpn_lateral{level}")(bottom_up[name])
            if inner is not None:
                lateral = lateral + F.interpolate(inner, scale_factor=2.0, mode="nearest")
            inner = lateral / 2 if self._averages and outputs else lateral
            outputs.insert(0, getattr(self, f"fpn_output{level}")(inner))
        if self.top_block is not None:
            outputs += self.top_block(outputs[-1])
        return dict(zip(self._out_features, outputs))


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build the FPN that `cfg.MODEL.FPN` describes on the ResNet of `cfg.MODEL.RESNETS`."""
    bottom_up, fpn = build_resnet_backbone(cfg, input_shape), cfg.MODEL.FPN
    return FPN(
        bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM, LastLevelMaxPool(), fuse_type=fpn.FUSE_TYPE
    )


def build_backbone(cfg, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build the backbone called `cfg.MODEL.BACKBONE.NAME`; raises KeyError for an unknown name."""
    build = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    return build(cfg, input_shape or ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))
