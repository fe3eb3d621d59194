"""The ground truth of a batch, padded to one size.

Shapes: B images, G ground-truth boxes (the most of any image, at least 1).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class GroundTruth(NamedTuple):
    """x_1: `(B, G, 4)` signal. classes: `(B, G)` int64. mask: `(B, G)` bool, False where padded."""

    x_1: Tensor
    classes: Tensor
    mask: Tensor

    @classmethod
    def pad(cls, x_1: Sequence[Tensor], classes: Sequence[Tensor]) -> "GroundTruth":
        """From the boxes `(G_i, 4)` in signal space and classes `(G_i,)` of every image."""
        most = max(1, max(len(c) for c in classes))
        padded_x_1 = x_1[0].new_zeros(len(x_1), most, 4)
        padded_classes = classes[0].new_zeros(len(x_1), most)
        mask = torch.zeros(len(x_1), most, dtype=torch.bool, device=x_1[0].device)
        for i, (boxes, labels) in enumerate(zip(x_1, classes)):
            padded_x_1[i, : len(labels)] = boxes
            padded_classes[i, : len(labels)] = labels
            mask[i, : len(labels)] = True
        return cls(padded_x_1, padded_classes, mask)

    def counts(self) -> list[int]:
        """The number of boxes of every image."""
        return self.mask.sum(1).tolist()
