"""Images of different sizes, padded into one tensor.

Shapes: B images of (C, H_i, W_i).
"""

import torch
from torch.nn import functional as F


class ImageList:
    """`tensor` (B, C, H, W), padded at the right and below; `image_sizes` holds each (H_i, W_i)."""

    def __init__(self, tensor: torch.Tensor, image_sizes: list[tuple[int, int]]):
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Image `index` without its padding."""
        height, width = self.image_sizes[index]
        return self.tensor[index, ..., :height, :width]

    def to(self, *args, **kwargs) -> "ImageList":
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: list[torch.Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: dict[str, int] | None = None,
    ) -> "ImageList":
        """Pad images (C, H_i, W_i) with `pad_value` to one size, a multiple of `size_divisibility` above 1.

        `padding_constraints` may hold "size_divisibility", which wins, and "square_size": if above 0, the
        side of a square that replaces the greatest height and width.
        """
        assert isinstance(tensors, (list, tuple)) and tensors, (
            "from_tensors takes a list of at least one image"
        )
        assert all(t.shape[:-2] == tensors[0].shape[:-2] for t in tensors), "images differ in their channels"
        image_sizes = [(t.shape[-2], t.shape[-1]) for t in tensors]
        height = max(size[0] for size in image_sizes)
        width = max(size[1] for size in image_sizes)
        constraints = padding_constraints or {}
        if constraints.get("square_size", 0) > 0:
            height = width = constraints["square_size"]
        stride = constraints.get("size_divisibility", size_divisibility)
        if stride > 1:
            height = (height + stride - 1) // stride * stride
            width = (width + stride - 1) // stride * stride
        padded = [
            F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=pad_value) for t in tensors
        ]
        return ImageList(torch.stack(padded).contiguous(), image_sizes)
