"""The dense predictor: every cell of the pyramid answers for the object at whose centre it lies.

It makes the losses of the shared block itself (docs/math.md, equations 20 to 23). "plain" is FCOS (arXiv
1904.01355, section 3) with centre sampling and boxes relative to one of the level's size; as a flow, a cell
begins at a noisy box instead. Training needs it only.
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
from dfm_d2.flow import BoxSpace, CondOTPath, keyed_normal, keyed_uniform
from dfm_d2.flow.noise import STREAM_DENSE, STREAM_DENSE_BACKGROUND, STREAM_DENSE_TIME
from dfm_d2.flow.time_embedding import TimeEmbedding
from dfm_d2.local_update import SHARED_BLOCK

# A cell answers for an object whose centre is less than this away in x and in y, in strides of its level.
RADIUS = 1.5
# Standard deviation of the source distribution, in sides of the cell's own box.
SOURCE_STD = 0.25
# The logit of a cell beyond its image: a loss and a gradient of exactly zero.
_SILENT = -1e4


class DenseSample(NamedTuple):
    """Where the cells stand in a step.

    x_t: `(B, N, 4)` signal. t: `(B,)`. offset: `(B, N, 4)`, x_t minus the cell's own box, in sides of that.
    gt_index: `(B, N)` into the ground truth, -1 for background. inside: `(B, N)` bool, cells of the image.
    """

    x_t: Tensor
    t: Tensor
    offset: Tensor
    gt_index: Tensor
    inside: Tensor


class DensePredictor(nn.Module):
    """Two convolutions, one class and one box answer, the same on every level.

    Args:
        dim: C. num_classes: K. strides: of the L levels, from fine to coarse.
        canonical_size: an object's level is the one that it is pooled from, see head.FeaturePooler.
        space: meaning of raw answers. criterion: the loss.
        is_flow: cells start at a sample of a source distribution, not at their own box.
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
        is_flow: bool,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.canonical_size = canonical_size
        self.space, self.criterion = space, criterion
        self.is_flow = is_flow
        layers: list[nn.Module] = []
        for _ in range(2):
            norm = nn.GroupNorm(math.gcd(32, dim // 2), dim)
            layers += [nn.Conv2d(dim, dim, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True)]
        self.tower = nn.Sequential(*layers)
        self.class_logits, self.box_answer = answer_layers(dim, num_classes)
        if is_flow:
            self.box_embedding = nn.Sequential(nn.Linear(4, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim))
            self.time_embedding = TimeEmbedding(dim)

    def forward(self, features: Sequence[Tensor], sample: DenseSample) -> tuple[Tensor, Tensor]:
        """L maps `(B, C, H_l, W_l)` to class logits `(B, N, K)` and raw box answers `(B, N, 4)`."""
        if self.is_flow:
            embedded = self.box_embedding(sample.offset.to(features[0].dtype))
            embedded = (embedded + self.time_embedding(sample.t)[:, None]).transpose(1, 2)
            parts = embedded.split([feature.shape[-2:].numel() for feature in features], dim=2)
            features = [f + part.unflatten(2, f.shape[-2:]) for f, part in zip(features, parts)]
        answer = torch.cat([self.tower(feature).flatten(2) for feature in features], dim=2).transpose(1, 2)
        return self.class_logits(answer), self.box_answer(answer)

    def losses(
        self, features: Sequence[Tensor], sample: DenseSample, ground_truth: GroundTruth
    ) -> dict[str, Tensor]:
        """Scalars `loss_cls/shared` and `loss_giou/shared`, each per cell that has an object."""
        class_logits, boxes = self(features, sample)
        class_logits = class_logits.to(sample.x_t.dtype).masked_fill(~sample.inside[..., None], _SILENT)
        x_1_hat = self.space.endpoint(sample.x_t, boxes)
        targets = assigned_targets(ground_truth, sample.gt_index, self.num_classes)
        losses = self.criterion(class_logits, x_1_hat, *targets, sample.t)
        return {f"loss_{key}/{SHARED_BLOCK}": value for key, value in losses.items()}

    def sample(
        self, size: Sequence[int], image_sizes: Tensor, ground_truth: GroundTruth, keys: Sequence[int]
    ) -> DenseSample:
        """Where the cells of images padded to `size` (height, width) stand; image_sizes: `(B, 2)` without it.

        The noise of a cell depends on the key of its image and its place, not on the padding.
        """
        center, level, number = self._cells(size, image_sizes)
        stride = center.new_tensor(self.strides)[level]
        inside = (center < image_sizes.flip(-1)[:, None]).all(-1)
        gt_index = self._assign(center, level, stride, image_sizes, ground_truth).masked_fill(~inside, -1)
        # The middle of the sides that belong on the level.
        half = (1.5 * self.canonical_size / 16 * stride / 2)[:, None]
        own = torch.cat([center - half, center + half], dim=-1).expand(len(keys), -1, -1)
        own = self.space.encode(own, image_sizes)
        if not self.is_flow:
            return DenseSample(own, own.new_zeros(len(keys)), torch.zeros_like(own), gt_index, inside)
        sides = (own[..., 2:] + self.space.signal_scale).repeat(1, 1, 2)
        streams = (STREAM_DENSE, STREAM_DENSE_BACKGROUND)
        noise = (keyed_normal(keys, number, stream, own.device).to(own.dtype) for stream in streams)
        x_0, background = (own + SOURCE_STD * sides * normal for normal in noise)
        _, x_1 = assigned_targets(ground_truth, gt_index, self.num_classes)
        x_1 = torch.where((gt_index >= 0)[..., None], x_1, background)
        t = keyed_uniform(keys, 1, STREAM_DENSE_TIME, own.device)[:, 0]
        path = CondOTPath().sample(x_0, x_1, t)
        return DenseSample(path.x_t, path.t, (path.x_t - own) / sides, gt_index, inside)

    def _cells(self, size: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centre `(N, 2)` x, y in pixels, level `(N,)` and a number of its own `(N,)` of every cell."""
        centers, levels, numbers = [], [], []
        for level, stride in enumerate(self.strides):
            rows, columns = (torch.arange(-(-side // stride), device=like.device) for side in size)
            row, column = (x.flatten() for x in torch.meshgrid(rows, columns, indexing="ij"))
            centers.append((torch.stack([column, row], dim=-1).to(like.dtype) + 0.5) * stride)
            levels.append(torch.full_like(row, level))
            numbers.append((level << 40) + (row << 20) + column)
        return torch.cat(centers), torch.cat(levels), torch.cat(numbers)

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
