"""Boxes of one image, and the ways in which a box is written.

Shapes: N boxes.
"""

from enum import IntEnum, unique

import numpy as np
import torch


@unique
class BoxMode(IntEnum):
    """How four numbers are a box, in pixels."""

    XYXY_ABS = 0  # (x0, y0, x1, y1)
    XYWH_ABS = 1  # (x0, y0, width, height)

    @staticmethod
    def convert(box, from_mode: "BoxMode", to_mode: "BoxMode"):
        """Convert 4 numbers (tuple, list), or an array or tensor (N, 4), to another of the same type."""
        if from_mode == to_mode:
            return box
        if isinstance(box, (list, tuple)):
            assert len(box) == 4, f"a box has 4 numbers, not {len(box)}"
            array = torch.tensor(box)[None]
        else:
            array = torch.from_numpy(np.array(box)) if isinstance(box, np.ndarray) else box.clone()
        # (XYXY_ABS, XYWH_ABS) subtracts the corner, (XYWH_ABS, XYXY_ABS) adds it.
        array[:, 2:] += array[:, :2] if to_mode == BoxMode.XYXY_ABS else -array[:, :2]
        if isinstance(box, (list, tuple)):
            return type(box)(array.flatten().tolist())
        return array.numpy() if isinstance(box, np.ndarray) else array


class Boxes:
    """Boxes (x0, y0, x1, y1) of one image, `tensor` of shape (N, 4), always float32."""

    def __init__(self, tensor: torch.Tensor):
        if isinstance(tensor, torch.Tensor):
            tensor = tensor.to(torch.float32)
        else:
            tensor = torch.as_tensor(tensor, dtype=torch.float32)
        if tensor.numel() == 0:
            tensor = tensor.reshape(-1, 4)
        assert tensor.dim() == 2 and tensor.shape[1] == 4, (
            f"Boxes need shape (N, 4), not {tuple(tensor.shape)}"
        )
        self.tensor = tensor

    def clone(self) -> "Boxes":
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device) -> "Boxes":
        return Boxes(self.tensor.to(device=device))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def area(self) -> torch.Tensor:
        """(N,) areas in square pixels."""
        width_height = self.tensor[:, 2:] - self.tensor[:, :2]
        return width_height[:, 0] * width_height[:, 1]

    def clip(self, box_size: tuple[int, int]) -> None:
        """Limit x to [0, width] and y to [0, height], in place; `box_size` is (height, width).

        Raises AssertionError where a coordinate is not finite.
        """
        assert torch.isfinite(self.tensor).all(), "a box has a coordinate that is infinite or not a number"
        height, width = box_size
        x = self.tensor[:, 0::2].clamp(min=0, max=width)
        y = self.tensor[:, 1::2].clamp(min=0, max=height)
        self.tensor = torch.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), dim=1)

    def nonempty(self, threshold: float = 0.0) -> torch.Tensor:
        """(N,) bool: both sides are longer than `threshold`."""
        return ((self.tensor[:, 2:] - self.tensor[:, :2]) > threshold).all(dim=1)

    def __getitem__(self, item) -> "Boxes":
        """Boxes of an int (one box), a slice, an index vector or a mask."""
        if isinstance(item, int):
            return Boxes(self.tensor[item].view(1, -1))
        boxes = self.tensor[item]
        assert boxes.dim() == 2, f"indexing Boxes with {item} does not leave a matrix"
        return Boxes(boxes)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self):
        """Yield each box as a tensor (4,)."""
        yield from self.tensor

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"

    def get_centers(self) -> torch.Tensor:
        """(N, 2) centres (x, y)."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply x and y, in place."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    @classmethod
    def cat(cls, boxes_list: list["Boxes"]) -> "Boxes":
        """Concatenate; the result shares no storage with the inputs. An empty list gives no boxes."""
        assert isinstance(boxes_list, (list, tuple)), "Boxes.cat takes a list of Boxes"
        if not boxes_list:
            return cls(torch.empty(0))
        assert all(isinstance(boxes, Boxes) for boxes in boxes_list), "Boxes.cat takes a list of Boxes"
        return cls(torch.cat([boxes.tensor for boxes in boxes_list]))
