"""Candidates to Detectron2's Instances, or to padded tensors.

Shapes: B images, M candidates, K classes, L detections of an image at most.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfm_d2.detection.sampler import Candidates, SamplerSettings
from dfm_d2.errors import UserError
from dfm_d2.flow import BoxSpace
from dfm_d2.framework import Boxes, Instances, batched_nms, detector_postprocess

# Candidates of one image that enter NMS at most, best first: ten times what is kept.
_BEFORE_NMS = 10


def detections(
    candidates: Candidates,
    space: BoxSpace,
    image_sizes: Tensor,
    batched_inputs: Sequence[dict],
    settings: SamplerSettings,
) -> list[dict]:
    """One {"instances": Instances} an image, in the image's original size.

    Every (candidate, class) pair is a detection; scores at or below `score_thresh` are dropped, then
    overlapping ones of a class (NMS), then all but the best `detections_per_image`. Raises UserError for
    boxes that are not finite.
    """
    boxes_xyxy = space.decode(candidates.x_1_hat, image_sizes)
    # A trace would keep numbers as they are; what Instances hold is whatever size they are given.
    sizes = image_sizes.to(torch.int64)
    sizes = list(sizes) if torch.jit.is_tracing() else [tuple(size) for size in sizes.tolist()]
    num_classes, kept = candidates.class_probs.shape[2], settings.detections_per_image
    results = []
    for all_boxes, probs, size, item in zip(boxes_xyxy, candidates.class_probs, sizes, batched_inputs):
        scores, order = probs.flatten().topk(min(_BEFORE_NMS * kept, probs.numel()))
        above = scores > settings.score_thresh  # false for NaN, which topk puts first
        scores, order = scores[above], order[above]
        boxes = Boxes(all_boxes)
        try:
            boxes.clip(size)
        except AssertionError as error:
            raise UserError(
                f"The model's boxes of image {item.get('image_id')!r} are not finite: MODEL.WEIGHTS are "
                "damaged, or SOLVER.BASE_LR was too large."
            ) from error
        boxes, classes = boxes.tensor[order // num_classes], order % num_classes
        keep = torch.arange(scores.shape[0], device=scores.device)
        if settings.nms_thresh > 0:
            keep = batched_nms(boxes, scores, classes, settings.nms_thresh)
        keep = keep[:kept]
        found = {"pred_boxes": Boxes(boxes[keep]), "scores": scores[keep], "pred_classes": classes[keep]}
        whole = item.get("height", size[0]), item.get("width", size[1])
        results.append({"instances": detector_postprocess(Instances(size, **found), *whole)})
    return results


class PaddedDetections(NamedTuple):
    """Detections of B images as tensors of one size, best first; rows from `count` on are padding.

    boxes_xyxy: `(B, L, 4)` pixels of the image as the network saw it. scores: `(B, L)`.
    classes: `(B, L)` int64, -1 in the padding. count: `(B,)` int64.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    classes: Tensor
    count: Tensor


def padded_detections(
    candidates: Candidates, space: BoxSpace, image_sizes: Tensor, settings: SamplerSettings
) -> PaddedDetections:
    """As `detections`, for graphs: static shapes but for B and for what NMS keeps inside of it.

    One NMS for all: boxes of another image or class are moved to a place of their own.
    """
    boxes_xyxy = space.decode(candidates.x_1_hat, image_sizes)
    height, width = image_sizes[:, None, :].to(boxes_xyxy.dtype).unbind(-1)
    limits = torch.stack([width, height, width, height], dim=-1)
    boxes_xyxy = torch.minimum(boxes_xyxy.clamp(min=0), limits)
    num_images, _, num_classes = candidates.class_probs.shape
    probs = candidates.class_probs.flatten(1)
    scores, order = probs.topk(min(_BEFORE_NMS * settings.detections_per_image, probs.shape[1]))
    classes = order % num_classes
    boxes = boxes_xyxy.gather(1, (order // num_classes)[..., None].expand(-1, -1, 4))
    kept = scores > settings.score_thresh
    if settings.nms_thresh > 0:
        kept = kept & _kept_by_nms(boxes, scores, classes, num_classes, settings.nms_thresh)
    kept = kept & (kept.to(torch.int64).cumsum(1) <= settings.detections_per_image)
    # As detector_postprocess: boxes without area go last, so that they do not make room for others.
    kept = kept & (boxes[..., 2:] > boxes[..., :2]).all(-1)
    length = min(settings.detections_per_image, probs.shape[1])
    places = torch.arange(scores.shape[1], 0, -1, device=scores.device, dtype=torch.float32)
    rank, chosen = torch.where(kept, places, torch.zeros_like(places)).topk(length)
    valid = rank > 0
    zero = torch.zeros((), dtype=scores.dtype, device=scores.device)
    return PaddedDetections(
        torch.where(valid[..., None], boxes.gather(1, chosen[..., None].expand(-1, -1, 4)), zero),
        torch.where(valid, scores.gather(1, chosen), zero),
        torch.where(valid, classes.gather(1, chosen), torch.full_like(chosen, -1)),
        valid.to(torch.int64).sum(1),
    )


def _kept_by_nms(
    boxes_xyxy: Tensor, scores: Tensor, classes: Tensor, num_classes: int, threshold: float
) -> Tensor:
    """Which of the candidates `(B, M)` are left among those of the same image and class."""
    num_images, count = scores.shape
    # Classes fill a grid and images continue it downwards: in a row they would lie so far out that float32
    # rounds away parts of a pixel.
    columns = math.isqrt(num_classes - 1) + 1
    rows = -(-num_classes // columns)
    image = torch.arange(num_images, device=scores.device)[:, None]
    place = torch.stack([classes % columns, image * rows + classes // columns], dim=-1)
    moved = boxes_xyxy + (place.to(boxes_xyxy.dtype) * (boxes_xyxy.max() + 1)).repeat(1, 1, 2)
    # torchvision tells torch.export that NMS keeps at least two boxes, and a graph stops where it kept one:
    # two more, apart from all others, make it true.
    apart = moved.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]]).float()
    all_boxes = torch.cat([moved.float().reshape(-1, 4), apart])
    all_scores = torch.cat([scores.float().reshape(-1), apart.new_zeros(2)])
    from torchvision.ops import nms  # seconds to import, which training does not need

    keep = nms(all_boxes, all_scores, threshold)
    kept = torch.zeros(num_images * count + 2, dtype=torch.int64, device=scores.device)
    return kept.scatter(0, keep, 1)[:-2].view(num_images, count) > 0
