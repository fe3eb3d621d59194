"""Candidates to Detectron2's Instances. Shapes: B images, M candidates, K classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfm_d2.core import BoxSpace
from dfm_d2.framework import Boxes, Instances, batched_nms, detector_postprocess
from dfm_d2.modeling.sampler import Candidates, SamplerSettings

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
    overlapping ones of a class (NMS), then all but the best `detections_per_image`.
    """
    boxes_xyxy = space.decode(candidates.x_1_hat, image_sizes)
    results = []
    for boxes, probs, size, item in zip(
        boxes_xyxy, candidates.class_probs, image_sizes.tolist(), batched_inputs
    ):
        height, width = int(size[0]), int(size[1])
        instances = _instances(boxes, probs, (height, width), settings)
        out_height, out_width = item.get("height", height), item.get("width", width)
        results.append({"instances": detector_postprocess(instances, out_height, out_width)})
    return results


def _instances(
    boxes_xyxy: Tensor, probs: Tensor, size: tuple[int, int], settings: SamplerSettings
) -> Instances:
    num_classes = probs.shape[1]
    boxes = Boxes(boxes_xyxy)
    boxes.clip(size)
    scores, order = probs.flatten().topk(min(_BEFORE_NMS * settings.detections_per_image, probs.numel()))
    above = scores > settings.score_thresh  # false for NaN, which topk puts first
    scores, order = scores[above], order[above]
    chosen = boxes.tensor[order // num_classes]
    classes = order % num_classes
    if settings.nms_thresh > 0:
        keep = batched_nms(chosen, scores, classes, settings.nms_thresh)
    else:
        keep = torch.arange(len(scores), device=scores.device)
    keep = keep[: settings.detections_per_image]
    instances = Instances(size)
    instances.pred_boxes = Boxes(chosen[keep])
    instances.scores = scores[keep]
    instances.pred_classes = classes[keep]
    return instances
