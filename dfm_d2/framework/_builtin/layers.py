"""What backbones are made of, and non-maximum suppression."""

from abc import ABCMeta, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class ShapeSpec:
    """What is known of a feature map before it exists."""

    channels: int | None = None
    stride: int | None = None


class Backbone(nn.Module, metaclass=ABCMeta):
    """From images (B, C, H, W) to named feature maps."""

    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    # Height and width of the input must be a multiple of this; 0: any size.
    size_divisibility = 0
    # More wishes for ImageList.from_tensors, which a backbone outside of this subset may have.
    padding_constraints: dict[str, int] = {}

    @abstractmethod
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps by name."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map of `forward`."""
        channels, strides = self._out_feature_channels, self._out_feature_strides
        return {name: ShapeSpec(channels[name], strides[name]) for name in self._out_features}


def batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """Non-maximum suppression among boxes of the same `idxs`; computed in float32, half precision overflows.

    Shapes: boxes (N, 4), scores (N,), idxs (N,); returns the kept indices, best score first.
    """
    from torchvision.ops import batched_nms as nms  # seconds to import, much of it torch._dynamo

    return nms(boxes.float(), scores, idxs, iou_threshold)


class Conv2d(nn.Conv2d):
    """A convolution that applies its own `norm`, so that the norm's parameters are called `<conv>.norm.*`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str, **kwargs):
        """norm: as in `get_norm`. Padding is "same" for an odd kernel; kwargs are torch's."""
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, **kwargs)
        self.norm = get_norm(norm, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and affine parameters, all of them buffers; starts as the identity.

    `y = (x - running_mean) / sqrt(running_var + eps) * weight + bias`
    """

    # State dicts carry it; 3 is Detectron2's.
    _version = 3

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        # A tensor only after conversion from a batch norm: state dicts then keep that batch norm's keys.
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        # The fused op would also compute gradients of the fixed parameters; this does not.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + shift.reshape(1, -1, 1, 1).to(x.dtype)

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Replace every batch norm inside `module` by a frozen one of the same values; returns the module."""
        if isinstance(module, nn.BatchNorm2d):
            frozen = cls(module.num_features, module.eps)
            for name, value in module.state_dict().items():
                setattr(frozen, name, value.clone())
            return frozen
        for name, child in module.named_children():
            module.add_module(name, cls.convert_frozen_batchnorm(child))
        return module


def get_norm(norm: str, out_channels: int) -> nn.Module | None:
    """The norm layer "FrozenBN", "BN" or "GN" (32 groups); None for "". Raises ValueError for others."""
    makers = {"FrozenBN": FrozenBatchNorm2d, "BN": nn.BatchNorm2d, "GN": lambda c: nn.GroupNorm(32, c)}
    if norm and norm not in makers:
        raise ValueError(
            f"norm {norm!r} is not in the builtin framework: choose from '', {', '.join(makers)}."
        )
    return makers[norm](out_channels) if norm else None
