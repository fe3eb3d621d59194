"""The dense predictor: every cell of the pyramid answers for the object at whose centre it lies.

It makes the losses of the shared block itself (docs/math.md, equations 20 and 21): FCOS (arXiv 1904.01355,
section 3) with centre sampling, and boxes relative to one of the level's size. Training needs it only.
Shapes: B images, L levels, N cells of all levels, C channels, K classes, G ground-truth boxes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from dfm_kernels.multilevel_roi_align import assign_levels
from torch import Tensor, nn

from dfm_d2.detection.assignment import assigned_targets
from dfm_d2.detection.coupling import GroundTruth
from dfm_d2.detection.head import answer_layers
from dfm_d2.detection.loss import BlockLoss
from dfm_d2.flow import BoxSpace
from dfm_d2.local_update import SHARED_BLOCK

# A cell answers for an object whose centre is less than this away in x and in y, in strides of its level.
RADIUS = 1.5
# The logit of a cell beyond its image: a loss and a gradient of exactly zero.
_SILENT = -1e4


class Cells(NamedTuple):
    """What the cells of a step stand for.

    boxes: `(B, N, 4)` signal, the cells' own. gt_index: `(B, N)` into the ground truth, -1 for background.
    inside: `(B, N)` bool, cells of the image.
    """

    boxes: Tensor
    gt_index: Tensor
    inside: Tensor


class DensePredictor(nn.Module):
    """Two convolutions, one class and one box answer, the same on every level.

    Args:
        dim: C. num_classes: K. strides: of the L levels, from fine to coarse.
        canonical_size: an object's level is the one that it is pooled from, see head.FeaturePooler.
        space: meaning of raw answers. criterion: the loss.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_classes: int,
        strides: Sequence[int],
        canonical_size: float,
        space: BoxSpace,
        criterion: BlockLoss,
        channels: int = 0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.canonical_size = canonical_size
        self.space, self.criterion = space, criterion
        layers: list[nn.Module] = [nn.Conv2d(channels, dim, 1)] if channels else []
        for _ in range(2):
            norm = nn.GroupNorm(math.gcd(32, dim // 2), dim)
            layers += [nn.Conv2d(dim, dim, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True)]
        self.tower = nn.Sequential(*layers)
        self.class_logits, self.box_answer = answer_layers(dim, num_classes)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """L maps `(B, C, H_l, W_l)` to class logits `(B, N, K)` and raw box answers `(B, N, 4)`."""
        answer = torch.cat([self.tower(feature).flatten(2) for feature in features], dim=2).transpose(1, 2)
        return self.class_logits(answer), self.box_answer(answer)

    def losses(
        self, features: Sequence[Tensor], cells: Cells, ground_truth: GroundTruth, block: str = SHARED_BLOCK
    ) -> dict[str, Tensor]:
        """Scalars `loss_cls/shared` and `loss_giou/shared`, each per cell that has an object."""
        class_logits, boxes = self(features)
        class_logits = class_logits.to(cells.boxes.dtype).masked_fill(~cells.inside[..., None], _SILENT)
        x_1_hat = self.space.endpoint(cells.boxes, boxes)
        targets = assigned_targets(ground_truth, cells.gt_index, self.num_classes)
        t = x_1_hat.new_zeros(len(x_1_hat))  # cells know no time: the weight of the velocity term is 0
        losses = self.criterion(class_logits, x_1_hat, *targets, t)
        return {f"loss_{key}/{block}": value for key, value in losses.items()}

    def cells(self, size: Sequence[int], image_sizes: Tensor, ground_truth: GroundTruth) -> Cells:
        """The cells of images padded to `size` (height, width); image_sizes: `(B, 2)` without padding."""
        centers, levels = [], []
        for level, stride in enumerate(self.strides):
            rows, columns = (torch.arange(-(-side // stride), device=image_sizes.device) for side in size)
            row, column = (x.flatten() for x in torch.meshgrid(rows, columns, indexing="ij"))
            centers.append((torch.stack([column, row], dim=-1).to(image_sizes.dtype) + 0.5) * stride)
            levels.append(torch.full_like(row, level))
        center, level = torch.cat(centers), torch.cat(levels)
        stride = center.new_tensor(self.strides)[level]
        inside = (center < image_sizes.flip(-1)[:, None]).all(-1)
        gt_index = self._assign(center, level, stride, image_sizes, ground_truth).masked_fill(~inside, -1)
        # The middle of the sides that belong on the level.
        half = (1.5 * self.canonical_size / 16 * stride / 2)[:, None]
        own = torch.cat([center - half, center + half], dim=-1).expand(len(image_sizes), -1, -1)
        return Cells(self.space.encode(own, image_sizes), gt_index, inside)

    def _assign(
        self, center: Tensor, level: Tensor, stride: Tensor, image_sizes: Tensor, ground_truth: GroundTruth
    ) -> Tensor:
        """The object `(B, N)` of every cell, the smallest where there are several; -1 for none."""
        boxes = self.space.decode(ground_truth.x_1, image_sizes)
        finest = round(math.log2(self.strides[0]))
        levels = assign_levels(boxes.flatten(0, 1), len(self.strides), finest, self.canonical_size)
        distance = (center[:, None] - (boxes[..., :2] + boxes[..., 2:])[:, None] / 2).abs().amax(-1)
        takes = (distance < RADIUS * stride[:, None]) & (level[:, None] == levels.view(len(boxes), 1, -1))
        takes &= ground_truth.mask[:, None]
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, None]
        return torch.where(takes.any(-1), torch.where(takes, area, torch.inf).argmin(-1), -1)
