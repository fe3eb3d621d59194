"""Backbones of classifiers as a row of blocks, each a function of the output of the one before.

Shapes: B images, C channels, H x W pixels of a map, N tokens, P cells a side of the pooled grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu

from dfm_d2.engine.timm_models import build_timm_model, rows_of_modules
from dfm_d2.errors import UserError

_GROUP_CHANNELS = 8  # of a group norm


class SplitBackbone(nn.Module, ABC):
    """A backbone in `num_blocks` blocks."""

    channels: list[int]  # of the pooled output of each block, `P^2` times those of its map

    def __init__(self, pool: int):
        super().__init__()
        self.pool = pool

    @property
    def num_blocks(self) -> int:
        return len(self.channels)

    @abstractmethod
    def forward_block(self, index: int, x: Tensor) -> Tensor:
        """The output of a block; x: the output of the block before, images `(B, C, H, W)` for the first."""

    @abstractmethod
    def grid(self, x: Tensor) -> Tensor:
        """A block's output as a map `(B, C, H, W)`."""

    @abstractmethod
    def block_of(self, name: str) -> int:
        """The block that the parameter of this name belongs to."""

    def check_images(self, images: Tensor) -> None:
        """UserError for images `(B, C, H, W)` of a size that the backbone does not take."""

    def pooled(self, x: Tensor) -> Tensor:
        """A block's output averaged to P x P cells: `(B, C P^2)`."""
        return adaptive_avg_pool2d(self.grid(x), self.pool).flatten(1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The pooled output of every block."""
        pooled = []
        for index in range(self.num_blocks):
            images = self.forward_block(index, images)
            pooled.append(self.pooled(images))
        return pooled


class StagedBackbone(SplitBackbone):
    """Convolutional stages: the modules of each block, and the channels of its map. pool: P."""

    def __init__(self, stages: Sequence[Sequence[nn.Module]], channels: Sequence[int], pool: int):
        super().__init__(pool)
        # By position: names of torchvision's would be taken for a checkpoint of torchvision.
        self.stages = nn.ModuleList(nn.Sequential(*modules) for modules in stages)
        self.channels = [number * pool**2 for number in channels]

    def forward_block(self, index: int, x: Tensor) -> Tensor:
        return self.stages[index](x)

    def grid(self, x: Tensor) -> Tensor:
        return x

    def block_of(self, name: str) -> int:
        return int(name.split(".")[1])


class ViTBackbone(SplitBackbone):
    """timm's VisionTransformer without its classifier; groups: the layers of each block. pool: P.

    The embedding is of the first block, the final norm of the last.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[int]], pool: int):
        super().__init__(pool)
        self.model = model
        self.groups = [list(group) for group in groups]
        self.channels = [model.embed_dim * pool**2] * len(groups)

    def check_images(self, images: Tensor) -> None:
        size, wanted = tuple(images.shape[-2:]), tuple(self.model.patch_embed.img_size)
        if size != wanted:
            raise UserError(
                f"images are {size[0]} x {size[1]} pixels, but the vision transformer wants {wanted[0]} x "
                f"{wanted[1]}: set INPUT.IMAGE_SIZE {wanted[0]}, or img_size={size[0]} in "
                "MODEL.TIMM.OPTIONS."
            )

    def forward_block(self, index: int, x: Tensor) -> Tensor:
        model = self.model
        if index == 0:
            x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for layer in self.groups[index]:
            x = model.blocks[layer](x)
        return model.norm(x) if index == len(self.groups) - 1 else x

    def grid(self, x: Tensor) -> Tensor:
        patches = x[:, self.model.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, self.model.patch_embed.grid_size)

    def block_of(self, name: str) -> int:
        parts = name.split(".")[1:]
        if parts[0] == "blocks":
            return next(i for i, group in enumerate(self.groups) if int(parts[1]) in group)
        return len(self.groups) - 1 if parts[0] == "norm" else 0


class ResidualPair(nn.Module):
    """`relu(x' + conv(relu(conv(x))))` of 3x3 convolutions with norms, `x'` a 1x1 convolution of x."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str):
        super().__init__()

        def conv(inputs: int, size: int, stride: int) -> nn.Sequential:
            layer = nn.Conv2d(inputs, channels, size, stride, size // 2, bias=False)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            return nn.Sequential(layer, _norm(norm, channels))

        self.first, self.second = conv(in_channels, 3, stride), conv(channels, 3, 1)
        self.shortcut = conv(in_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C_in, H, W)` to `(B, C, H / stride, W / stride)`."""
        return relu(self.shortcut(x) + self.second(relu(self.first(x))))


def _norm(name: str, channels: int) -> nn.Module:
    if name == "BN":
        return nn.BatchNorm2d(channels)
    if channels % _GROUP_CHANNELS:
        raise UserError(f"MODEL.CLASSIFIER.CNN.NORM GN needs channels in groups of {_GROUP_CHANNELS}.")
    return nn.GroupNorm(channels // _GROUP_CHANNELS, channels)


def build_split_backbone(cfg) -> SplitBackbone:
    """The backbone of `MODEL.CLASSIFIER`. UserError, naming the key, where it cannot be built or split so."""
    classifier = cfg.MODEL.CLASSIFIER
    if classifier.BACKBONE == "timm":
        return _timm_backbone(cfg)
    cnn = classifier.CNN
    channels = [len(cfg.MODEL.PIXEL_MEAN), *cnn.CHANNELS]
    pairs = zip(channels, cnn.CHANNELS, cnn.STRIDES)
    return _staged([[ResidualPair(*pair, cnn.NORM)] for pair in pairs], cnn.CHANNELS, classifier)


def _groups(number: int, blocks: int) -> list[list[int]]:
    """`number` stages in `blocks` groups of about one size; 0: one each."""
    if blocks > number:
        raise UserError(
            f"MODEL.CLASSIFIER.BLOCKS is {blocks}, but the backbone has {number} stages: set it lower."
        )
    return [part.tolist() for part in np.array_split(np.arange(number), blocks or number)]


def _staged(stages: Sequence[Sequence[nn.Module]], channels: Sequence[int], classifier) -> StagedBackbone:
    groups = _groups(len(stages), classifier.BLOCKS)
    merged = [[module for stage in group for module in stages[stage]] for group in groups]
    found = StagedBackbone(merged, [channels[group[-1]] for group in groups], classifier.POOL)
    return found.to(memory_format=torch.channels_last)  # on a CPU up to two fifths less time


def _timm_backbone(cfg) -> SplitBackbone:
    from timm.layers import Format
    from timm.models import FeatureListNet, VisionTransformer

    classifier, model = cfg.MODEL.CLASSIFIER, build_timm_model(cfg)
    if isinstance(model, VisionTransformer):
        return ViTBackbone(model, _groups(len(model.blocks), classifier.BLOCKS), classifier.POOL)
    # Of others than CNNs, such as Swin, maps come with their channels last.
    if not isinstance(model, FeatureListNet) or model.output_fmt != Format.NCHW:
        raise UserError(
            f"MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME} is a {type(model).__name__}, which has no row of stages "
            "with maps (C, H, W): take a VisionTransformer, or a CNN such as a ResNet, RegNet or ConvNeXt."
        )
    return _staged(rows_of_modules(model), model.feature_info.channels(), classifier)
