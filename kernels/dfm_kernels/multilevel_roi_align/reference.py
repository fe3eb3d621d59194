"""RoIAlign over the levels of a feature pyramid, equal to Detectron2's `ROIPooler("ROIAlignV2")`.

Every cell of the RoI grid is a weighted sum of pixels of one level, so pooling from all levels, images and
proposals at once is one embedding bag over the pyramid's pixels: no loop over levels and no index whose
length depends on data. On a CPU it is also several times faster than torchvision's operator, whose backward
runs on one thread (benchmarks/kernels.py).
Shapes: B images, N proposals, L levels, C channels, P grid cells a side, S samples a cell and side.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def size_tensor(
    sizes: Sequence[int | Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """`torch.tensor(sizes)`; under torch.jit.trace it follows the shapes that `sizes` were read from.

    There a size is a tensor of no dimension, of which `torch.tensor` would keep the number alone.

    Args:
        sizes: numbers, or pairs of them.
    """
    if not torch.jit.is_tracing():
        return torch.tensor(sizes, device=device, dtype=dtype)
    if isinstance(sizes, (tuple, list)):
        return torch.stack([size_tensor(size, device, dtype) for size in sizes])
    return torch.as_tensor(sizes, device=device, dtype=dtype)


def assign_levels(boxes_xyxy: Tensor, num_levels: int, min_level: int, canonical_size: float) -> Tensor:
    """FPN's rule (arXiv 1612.03144, eq. 1): `floor(4 + log2(sqrt(area) / canonical_size))`, clamped.

    Args:
        boxes_xyxy: `(M, 4)` pixels.
        min_level: log2 of the finest level's stride.

    Returns:
        `(M,)` int64 in [0, num_levels); 0, the finest, for a box that is not a number.
    """
    sides = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clamp(min=0)
    # 1e-8 keeps the logarithm of an empty box finite; it then falls on the finest level.
    level = torch.floor(4 + torch.log2(sides.prod(1).sqrt() / canonical_size + 1e-8))
    level = level.nan_to_num(min_level, torch.inf, -torch.inf)
    return level.clamp(min_level, min_level + num_levels - 1).to(torch.int64) - min_level


def _axis(
    low: Tensor, length: Tensor, size: Tensor, output_size: int, sampling_ratio: int
) -> tuple[Tensor, Tensor]:
    """The pixels that the samples along one axis touch, and their bilinear weights.

    Args:
        low, length: `(M,)` start and length of the RoI in pixels of its level. size: `(M,)` pixels there.

    Returns:
        `(M, P, S, 2)` int64 pixels and weights that already hold the mean over the samples.
    """
    bin_size = length / output_size
    if sampling_ratio > 0:
        ratio = torch.full_like(length, sampling_ratio)
        samples = sampling_ratio
    else:
        # 0 for a box without extent, which then has no samples and pools to zero.
        ratio = bin_size.ceil().nan_to_num(0.0, torch.inf, -torch.inf)
        samples = max(int(ratio.max()), 1) if len(ratio) else 1
    divisor = ratio.clamp(min=1)
    k = torch.arange(samples, device=low.device, dtype=low.dtype)
    cell = torch.arange(output_size, device=low.device, dtype=low.dtype)
    inner = (k + 0.5) / divisor[:, None]
    position = low[:, None, None] + (cell[:, None] + inner[:, None]) * bin_size[:, None, None]
    last = (size - 1)[:, None, None].to(low.dtype)
    # Beyond one pixel outside the map a sample counts as zero, nearer it takes the border's value.
    counts = (position >= -1) & (position <= last + 1) & (k < ratio[:, None])[:, None]
    # Of a box that is not a number no sample counts, and its pixels must be some that are there.
    position = torch.minimum(position.nan_to_num(0.0, torch.inf, -torch.inf).clamp(min=0), last)
    first = position.floor()
    second = torch.minimum(first + 1, last)
    share = position - first
    weights = torch.stack([1 - share, share], dim=-1) * (counts / divisor[:, None, None])[..., None]
    return torch.stack([first, second], dim=-1).to(torch.int64), weights


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes_xyxy: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    canonical_size: float = 224.0,
) -> Tensor:
    """The specification of the op, which says what the arguments are."""
    num_images, num_proposals = boxes_xyxy.shape[:2]
    channels, device, dtype = features[0].shape[1], boxes_xyxy.device, boxes_xyxy.dtype
    boxes = boxes_xyxy.detach().reshape(-1, 4)
    level = assign_levels(boxes, len(features), round(-math.log2(scales[0])), canonical_size)

    sizes = size_tensor([f.shape[-2:] for f in features], device)
    # Rows of each level's pixels in the concatenated pyramid, and of each image's within a level.
    starts = size_tensor([0] + [num_images * f.shape[2] * f.shape[3] for f in features[:-1]], device)
    height, width = sizes[level].unbind(1)
    image = torch.arange(num_images, device=device).repeat_interleave(num_proposals)
    first_row = starts.cumsum(0)[level] + image * height * width

    # aligned: pixel centres lie at half-integers of the continuous coordinate.
    corners = boxes * torch.tensor(scales, device=device, dtype=dtype)[level][:, None] - 0.5
    sides = corners[:, 2:] - corners[:, :2]
    row, weight_y = _axis(corners[:, 1], sides[:, 1], height, output_size, sampling_ratio)
    column, weight_x = _axis(corners[:, 0], sides[:, 0], width, output_size, sampling_ratio)

    # (M, P, 1, S, 2, 1, 1) against (M, 1, P, 1, 1, S, 2): all pairs of cells, samples and corners.
    row, weight_y = row[:, :, None, :, :, None, None], weight_y[:, :, None, :, :, None, None]
    column, weight_x = column[:, None, :, None, None], weight_x[:, None, :, None, None]
    index = first_row.view(-1, 1, 1, 1, 1, 1, 1) + row * width.view(-1, 1, 1, 1, 1, 1, 1) + column
    weight = (weight_y * weight_x).to(features[0].dtype)

    pixels = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels) for f in features])
    index, weight = (x.flatten(0, 2).flatten(1) for x in (index, weight))  # a row a cell
    pooled = embedding_bag(index, pixels, per_sample_weights=weight, mode="sum")
    return pooled.view(-1, output_size, output_size, channels).permute(0, 3, 1, 2)
