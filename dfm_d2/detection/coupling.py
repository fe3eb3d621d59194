"""Coupling: which data `x_1` each noise sample `x_0` is paired with.

Shapes: B images, N proposals (and slots), G ground-truth boxes (the most of any image, at least 1).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfm_d2.flow.noise import STREAM_BACKGROUND, STREAM_PERMUTATION, keyed_normal, keyed_uniform

# Background boxes: a centre and size of 0.5 with this standard deviation, as shares of the image.
BACKGROUND_STD = 1 / 6


class GroundTruth(NamedTuple):
    """x_1: `(B, G, 4)` signal. classes: `(B, G)` int64. mask: `(B, G)` bool, False where padded."""

    x_1: Tensor
    classes: Tensor
    mask: Tensor

    @classmethod
    def pad(cls, x_1: Sequence[Tensor], classes: Sequence[Tensor]) -> "GroundTruth":
        """From the boxes `(G_i, 4)` in signal space and classes `(G_i,)` of every image."""
        most = max(1, max(len(c) for c in classes))
        padded = cls(
            x_1[0].new_zeros(len(x_1), most, 4),
            classes[0].new_zeros(len(x_1), most),
            torch.zeros(len(x_1), most, dtype=torch.bool, device=x_1[0].device),
        )
        for i, (boxes, labels) in enumerate(zip(x_1, classes)):
            for rows, values in zip(padded, (boxes, labels, True)):
                rows[i, : len(labels)] = values
        return padded


class Slots(NamedTuple):
    """x_1: `(B, N, 4)` signal. gt_index: `(B, N)` int64 into the ground truth, -1 for background."""

    x_1: Tensor
    gt_index: Tensor


def build_slots(
    ground_truth: GroundTruth, num_slots: int, gt_repeat: int, keys: Sequence[int], signal_scale: float
) -> Slots:
    """Fill the N slots of `x_1`: each ground-truth box up to `gt_repeat` times, the rest random boxes.

    Of more boxes than slots a random subset, by key, gets one slot each.

    Args:
        keys: one a image (dfm_d2.flow.noise.stream_key).
    """
    device = ground_truth.x_1.device
    std = 2 * BACKGROUND_STD * signal_scale
    background = keyed_normal(keys, num_slots, STREAM_BACKGROUND, device) * std
    x_1 = background.clamp(-signal_scale, signal_scale).to(ground_truth.x_1.dtype)
    gt_index = torch.full((len(keys), num_slots), -1, dtype=torch.int64, device=device)
    for i, count in enumerate(ground_truth.mask.sum(1).tolist()):
        filled = min(count * gt_repeat, num_slots)
        if filled == 0:
            continue
        order = torch.arange(count, device=device)
        if count > num_slots:
            order = keyed_uniform([keys[i]], count, STREAM_PERMUTATION, device)[0].argsort()
        gt_index[i, :filled] = order.repeat(-(-filled // count))[:filled]
        x_1[i, :filled] = ground_truth.x_1[i, gt_index[i, :filled]]
    return Slots(x_1, gt_index)


def couple(x_0: Tensor, slots: Slots, method: str, keys: Sequence[int]) -> Slots:
    """The slots reordered so that slot n is the data of noise sample n.

    optimal_transport: the permutation of least `sum |x_0 - x_1|^2` of each image, scipy's
    `linear_sum_assignment` (minibatch OT, arXiv 2302.00482). independent: a random permutation, by key.

    Args:
        x_0: `(B, N, 4)` signal. method: see MODEL.DFM.COUPLING; ValueError for any other.
    """
    if method == "independent":
        order = keyed_uniform(keys, x_0.shape[1], STREAM_PERMUTATION, x_0.device).argsort(1)
    elif method == "optimal_transport":
        from scipy.optimize import linear_sum_assignment  # not for inference

        cost = torch.cdist(x_0.float(), slots.x_1.float()).square().cpu().numpy()
        order = torch.stack([torch.from_numpy(linear_sum_assignment(c)[1]) for c in cost]).to(x_0.device)
    else:
        raise ValueError(f"coupling must be 'optimal_transport' or 'independent', got {method!r}")
    return Slots(slots.x_1.gather(1, order[..., None].expand_as(slots.x_1)), slots.gt_index.gather(1, order))
