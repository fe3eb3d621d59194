"""Images of different sizes in one tensor, and what is known of the objects of one image.

Shapes: B images of (C, H_i, W_i), N boxes.
"""

from enum import IntEnum
from typing import Any

import torch
from torch.nn import functional as F


class ImageList:
    """`tensor` (B, C, H, W), padded at the right and below; `image_sizes` holds each (H_i, W_i)."""

    def __init__(self, tensor: torch.Tensor, image_sizes: list[tuple[int, int]]):
        self.tensor = tensor
        self.image_sizes = image_sizes

    @staticmethod
    def from_tensors(
        tensors: list[torch.Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: dict[str, int] | None = None,
    ) -> "ImageList":
        """Pad images (C, H_i, W_i) with `pad_value` to one size, a multiple of `size_divisibility` above 1.

        Backbones of this subset have no `padding_constraints`; others raise AssertionError.
        """
        assert not padding_constraints, f"padding constraints {padding_constraints} are not in the subset"
        image_sizes = [(t.shape[-2], t.shape[-1]) for t in tensors]
        stride = max(size_divisibility, 1)
        height, width = ((max(sides) + stride - 1) // stride * stride for sides in zip(*image_sizes))
        padded = [
            F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=pad_value) for t in tensors
        ]
        return ImageList(torch.stack(padded), image_sizes)


class BoxMode(IntEnum):
    """How four numbers are a box, in pixels."""

    XYXY_ABS = 0  # (x0, y0, x1, y1)


class Boxes:
    """Boxes (x0, y0, x1, y1) of one image, `tensor` of shape (N, 4), always float32."""

    def __init__(self, tensor: torch.Tensor):
        tensor = torch.as_tensor(tensor, dtype=torch.float32)
        if tensor.numel() == 0:
            tensor = tensor.reshape(-1, 4)
        assert tensor.dim() == 2 and tensor.shape[1] == 4, (
            f"Boxes need shape (N, 4), not {tuple(tensor.shape)}"
        )
        self.tensor = tensor

    def to(self, device: torch.device) -> "Boxes":
        return Boxes(self.tensor.to(device=device))

    def clip(self, box_size: tuple[int, int]) -> None:
        """Limit x to [0, width] and y to [0, height], in place; `box_size` is (height, width).

        Raises AssertionError where a coordinate is not finite.
        """
        assert torch.isfinite(self.tensor).all(), "a box has a coordinate that is infinite or not a number"
        height, width = box_size
        x, y = self.tensor[:, 0::2].clamp(0, width), self.tensor[:, 1::2].clamp(0, height)
        self.tensor = torch.stack((x, y), dim=2).flatten(1)

    def nonempty(self) -> torch.Tensor:
        """(N,) bool: both sides are longer than 0."""
        return (self.tensor[:, 2:] > self.tensor[:, :2]).all(dim=1)

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply x and y, in place."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    def __getitem__(self, item) -> "Boxes":
        """Boxes of a slice, an index vector or a mask."""
        return Boxes(self.tensor[item])

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"


class Instances:
    """Fields of equal length (boxes, scores, classes, ...) for the objects of one image.

    Fields are attributes: `instances.scores = tensor` sets one, `instances.scores` reads it, and
    `instances[mask]` indexes all. Names that begin with an underscore are not fields.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any):
        """`image_size` is (height, width)."""
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        return self._image_size

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name: str) -> Any:
        # Reached only where normal lookup fails; "_fields" itself is missing while unpickling.
        if name == "_fields" or name not in self._fields:
            raise AttributeError(f"these Instances have no field '{name}'")
        return self._fields[name]

    def set(self, name: str, value: Any) -> None:
        """Set a field; raises AssertionError where its length is not that of the other fields."""
        if self._fields:
            assert len(value) == len(self), (
                f"field '{name}' has length {len(value)}, the others have {len(self)}"
            )
        self._fields[name] = value

    def get_fields(self) -> dict[str, Any]:
        """The fields themselves: changing the dict changes the Instances."""
        return self._fields

    def to(self, device: torch.device | str) -> "Instances":
        """Instances whose fields have been moved by their own `to`, where they have one."""
        fields = self._fields.items()
        moved = {name: value.to(device) if hasattr(value, "to") else value for name, value in fields}
        return Instances(self._image_size, **moved)

    def __getitem__(self, item) -> "Instances":
        """Index every field with an int (one object), a slice, an index vector or a mask."""
        if type(item) is int:
            if not -len(self) <= item < len(self):
                raise IndexError(f"index {item} is out of range for {len(self)} instances")
            item = slice(item, None, len(self))
        return Instances(self._image_size, **{name: value[item] for name, value in self._fields.items()})

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances without a field have no length")

    def __iter__(self):
        raise NotImplementedError("Instances cannot be iterated: index them")

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        height, width = self._image_size
        count = len(self) if self._fields else 0
        return (
            f"Instances(num_instances={count}, image_height={height}, image_width={width}, fields=[{fields}])"
        )


def detector_postprocess(results: Instances, output_height: int, output_width: int) -> Instances:
    """Scale `results.pred_boxes` from `results.image_size` to the output size, clip them, drop empty ones.

    The boxes of `results` are scaled in place.
    """
    boxes, (height, width) = results.pred_boxes, results.image_size
    boxes.scale(output_width / width, output_height / height)
    boxes.clip((output_height, output_width))
    size = (output_height, output_width)
    if isinstance(output_height, torch.Tensor):  # while a model is traced
        size = torch.stack(size)
    return Instances(size, **results.get_fields())[boxes.nonempty()]
