"""Convolution with its norm, norms, shapes of feature maps, and non-maximum suppression."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class ShapeSpec:
    """What is known of a feature map before it exists."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


def batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """Non-maximum suppression among boxes of the same `idxs`; computed in float32, half precision overflows.

    Shapes: boxes (N, 4), scores (N,), idxs (N,); returns the kept indices, best score first.
    """
    assert boxes.shape[-1] == 4, f"boxes need 4 numbers each, not {boxes.shape[-1]}"
    from torchvision.ops import batched_nms as nms  # seconds to import, much of it torch._dynamo

    return nms(boxes.float(), scores, idxs, iou_threshold)


class Conv2d(nn.Conv2d):
    """A convolution that applies its own `norm`, so that the norm's parameters are called `<conv>.norm.*`."""

    def __init__(self, *args, norm: nn.Module | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm

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
        self.num_features = num_features
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

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Replace every batch norm inside `module` by a frozen one of the same values; returns the module."""
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            frozen = cls(module.num_features, module.eps)
            if module.affine:
                frozen.weight.copy_(module.weight.detach())
                frozen.bias.copy_(module.bias.detach())
            frozen.running_mean.copy_(module.running_mean)
            frozen.running_var.copy_(module.running_var)
            frozen.num_batches_tracked = module.num_batches_tracked
            return frozen
        for name, child in module.named_children():
            replacement = cls.convert_frozen_batchnorm(child)
            if replacement is not child:
                module.add_module(name, replacement)
        return module


def get_norm(norm: str, out_channels: int) -> nn.Module | None:
    """The norm layer "FrozenBN", "BN" or "GN" (32 groups); None for "". Raises ValueError for others."""
    if norm == "":
        return None
    makers = {"FrozenBN": FrozenBatchNorm2d, "BN": nn.BatchNorm2d, "GN": lambda c: nn.GroupNorm(32, c)}
    if norm not in makers:
        raise ValueError(
            f"norm {norm!r} is not in the builtin framework: choose from '', {', '.join(makers)}."
        )
    return makers[norm](out_channels)
