"""Backbones of timm, in Detectron2's registry: CNNs under its FPN, plain vision transformers under the simple
feature pyramid of ViTDet (arXiv 2203.16527).

Shapes: B images, C channels, H x W pixels, h x w cells of a map.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dfm_d2.engine.timm_models import build_timm_model, rows_of_modules
from dfm_d2.errors import UserError
from dfm_d2.framework import BACKBONE_REGISTRY, FPN, Backbone, ShapeSpec

_STRIDES = (4, 8, 16, 32)
_GROUPS = 4  # of the layers of a vision transformer


class StagedNetwork(Backbone):
    """A stem and stages in a row, each a function of the one before; stages answer maps `(B, C, h, w)`.

    stages: by name. shapes: of their maps. freeze_at: 1 freezes the stem, 2 also the first stage, ...
    frozen_norm: freezes all batch norms.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Mapping[str, nn.Module],
        shapes: Mapping[str, ShapeSpec],
        freeze_at: int,
        frozen_norm: bool,
    ):
        super().__init__()
        self.stem = stem
        for name, stage in stages.items():
            self.add_module(name, stage)
        self._shapes = dict(shapes)
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and frozen_norm]
        self._frozen = [*list(self.children())[: max(freeze_at, 0)], *norms]
        for module in self._frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "StagedNetwork":
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of all stages of images `(B, 3, H, W)`, by name."""
        x, maps = images, {}
        # A CPU's depthwise convolutions in bfloat16 take twice the time of those in float32.
        on_cpu = torch.autocast("cpu", enabled=False) if images.device.type == "cpu" else nullcontext()
        with on_cpu:
            for name, stage in self.named_children():
                maps[name] = x = stage(x)
        del maps["stem"]
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)


class SameConv(nn.Conv2d):
    """timm's Conv2dSame on sides that its stride divides, as padded images have: a padding that is constant.

    timm computes it from the sides, with which torch.export takes many minutes.
    """

    def __init__(self, conv: nn.Conv2d):
        sizes, more = (conv.kernel_size, conv.stride), {"dilation": conv.dilation, "groups": conv.groups}
        super().__init__(conv.in_channels, conv.out_channels, *sizes, **more, bias=conv.bias is not None)
        self.weight, self.bias = conv.weight, conv.bias
        totals = [max(d * (k - 1) + 1 - s, 0) for k, s, d in zip(*sizes, conv.dilation)]
        self.pads = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, self.pads))


class PatchEmbedding(nn.Module):
    """Images `(B, 3, H, W)` to patches `(B, C, H/P, W/P)` with positions, interpolated to the image.

    vit: timm's VisionTransformer. Its class and register tokens are left out, as in ViTDet.
    """

    def __init__(self, vit: nn.Module):
        super().__init__()
        embed = vit.patch_embed
        self.proj, self.norm, self.norm_pre, self.grid = embed.proj, embed.norm, vit.norm_pre, embed.grid_size
        self.pos_embed = None
        if vit.pos_embed is not None:
            self.pos_embed = nn.Parameter(vit.pos_embed[:, -embed.num_patches :].detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        from timm.layers import resample_abs_pos_embed

        x = self.proj(images)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        if self.pos_embed is not None:
            size = x.shape[-2:]
            tokens = tokens + resample_abs_pos_embed(self.pos_embed, size, self.grid, num_prefix_tokens=0)
        return self.norm_pre(tokens).transpose(1, 2).reshape(x.shape)


class TokenLayers(nn.Sequential):
    """Layers of a transformer on a map `(B, C, h, w)`, whose cells are the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class ViTPyramid(Backbone):
    """ViTDet's simple feature pyramid: p2 to p5, of strides 4 to 32, from the last map alone."""

    size_divisibility = _STRIDES[-1]

    def __init__(self, bottom_up: StagedNetwork, out_channels: int):
        super().__init__()
        self.bottom_up = bottom_up
        *_, (self._last, shape) = bottom_up.output_shape().items()
        for level, stride in enumerate(_STRIDES, 2):
            self.add_module(f"pyramid{level}", _level(shape.channels, shape.stride, stride, out_channels))
        self._shapes = {f"p{k}": ShapeSpec(out_channels, stride=s) for k, s in enumerate(_STRIDES, 2)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps `(B, out_channels, H/stride, W/stride)` of images `(B, 3, H, W)`, by name."""
        x = self.bottom_up(images)[self._last]
        return {name: getattr(self, f"pyramid{name[1:]}")(x) for name in self._shapes}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)


def _level(channels: int, patch: int, stride: int, out_channels: int) -> nn.Sequential:
    """From the map of stride `patch` to one of `stride`: half the channels at twice the side, or maxima."""
    from timm.layers import LayerNorm2d

    layers: list[nn.Module] = [nn.MaxPool2d(stride // patch)] if stride > patch else []
    while patch > stride:
        layers += [LayerNorm2d(channels), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels, patch = channels // 2, patch // 2
    for size in (1, 3):
        conv = nn.Conv2d(channels, out_channels, size, padding=size // 2, bias=False)
        layers += [conv, LayerNorm2d(out_channels)]
        channels = out_channels
    return nn.Sequential(*layers)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """The FPN of ``MODEL.FPN`` on the CNN (or Swin) of ``MODEL.TIMM``: from the finest of
    ``MODEL.DFM.HEAD.IN_FEATURES`` to stride 32."""
    from timm.layers import Conv2dSame, Format
    from timm.models import FeatureListNet
    from torchvision.ops import Permute

    model, fpn, levels = build_timm_model(cfg), cfg.MODEL.FPN, [f"stage{k}" for k in range(2, 6)]
    info = model.feature_info if isinstance(model, FeatureListNet) else None
    if info is None or tuple(info.reduction()[-4:]) != _STRIDES:
        raise UserError(
            f"MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME} is a {type(model).__name__} without a row of stages of "
            "strides 4, 8, 16, 32: take a CNN such as a ResNet, EfficientNet or ConvNeXt, or for a vision "
            "transformer MODEL.BACKBONE.NAME build_timm_vit_pyramid_backbone."
        )
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv2dSame):
                setattr(parent, name, SameConv(child))
    # The stem is all before the module that ends the first level.
    *early, first, second, third, fourth = rows_of_modules(model)
    rows = [first[-1:], second, third, fourth]
    to_map, from_map = [], []
    if model.output_fmt == Format.NHWC:
        to_map, from_map = [Permute([0, 3, 1, 2])], [Permute([0, 2, 3, 1])]
    stem = nn.Sequential(*chain(*early), *first[:-1], *to_map)
    stages = {name: nn.Sequential(*from_map, *row, *to_map) for name, row in zip(levels, rows)}
    sizes = zip(levels, info.channels()[-4:], _STRIDES)
    shapes = {name: ShapeSpec(channels, stride=stride) for name, channels, stride in sizes}
    bottom_up = StagedNetwork(stem, stages, shapes, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.TIMM.FROZEN_NORM)
    used = [k for k in range(2, 6) if f"p{k}" in cfg.MODEL.DFM.HEAD.IN_FEATURES]
    found = FPN(
        bottom_up, levels[min(used, default=2) - 2 :], fpn.OUT_CHANNELS, fpn.NORM, fuse_type=fpn.FUSE_TYPE
    )
    return found.to(memory_format=torch.channels_last)  # a fifth less time on a CPU


@BACKBONE_REGISTRY.register()
def build_timm_vit_pyramid_backbone(cfg, input_shape: ShapeSpec) -> ViTPyramid:
    """ViTDet's pyramid of ``MODEL.FPN.OUT_CHANNELS`` on the vision transformer of ``MODEL.TIMM``, in
    four groups of layers."""
    from timm.models import VisionTransformer

    model, name = build_timm_model(cfg), cfg.MODEL.TIMM.NAME
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"MODEL.TIMM.NAME {name} is a {type(model).__name__}, no plain vision transformer: set "
            "MODEL.BACKBONE.NAME build_timm_fpn_backbone."
        )
    patch = model.patch_embed.patch_size
    if patch[0] != patch[1] or patch[0] not in (8, 16, 32):
        raise UserError(f"MODEL.TIMM.NAME {name} has patches of {patch[0]} x {patch[1]}: take 8, 16 or 32.")
    groups = np.array_split(np.arange(len(model.blocks)), min(_GROUPS, len(model.blocks)))
    layers = [[model.blocks[i] for i in group] for group in groups]
    layers[-1].append(model.norm)
    stages = {f"group{k}": TokenLayers(*group) for k, group in enumerate(layers, 1)}
    shapes = dict.fromkeys(stages, ShapeSpec(model.embed_dim, stride=patch[0]))
    freeze_at, frozen_norm = cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.TIMM.FROZEN_NORM
    bottom_up = StagedNetwork(PatchEmbedding(model), stages, shapes, freeze_at, frozen_norm)
    return ViTPyramid(bottom_up, cfg.MODEL.FPN.OUT_CHANNELS)
