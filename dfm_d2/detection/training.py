"""What a training step of the detectors needs besides the model. Shapes: B images, N proposals, K classes."""

from collections.abc import Sequence

import torch
from dfm_kernels.flow_loss import paired_giou
from torch import Tensor
from torch.nn.functional import pad

from dfm_d2.detection.coupling import GroundTruth
from dfm_d2.errors import UserError
from dfm_d2.flow import BoxSpace
from dfm_d2.local_update.processes import max_over_processes, world_size


def of_common_size(images: Tensor) -> Tensor:
    """`(B, 3, H, W)` padded as those of all processes together: what is beyond an image shows in it."""
    if world_size() == 1:
        return images
    size = torch.tensor(images.shape[-2:], device=images.device)
    height, width = (max_over_processes(size) - size).tolist()
    return pad(images, (0, width, 0, height)) if height or width else images


def pad_ground_truth(
    batched_inputs: Sequence[dict], image_sizes: Tensor, space: BoxSpace, num_classes: int
) -> GroundTruth:
    """The boxes of a batch in signal space, on the device of `image_sizes` `(B, 2)`.

    Raises:
        UserError: an input without "instances", or with a class outside [0, K); the message names it.
    """
    x_1, classes = [], []
    for index, (item, size) in enumerate(zip(batched_inputs, image_sizes)):
        name = repr(item.get("file_name", index))
        if "instances" not in item:
            raise UserError(f"training input {name} has no 'instances' to learn from")
        instances = item["instances"].to(image_sizes.device)
        labels = instances.gt_classes
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise UserError(
                f"{name} has a class outside [0, {num_classes}): "
                "set MODEL.DFM.NUM_CLASSES to the data set's number of classes"
            )
        x_1.append(space.encode(instances.gt_boxes.tensor.to(size.dtype), size))
        classes.append(labels)
    return GroundTruth.pad(x_1, classes)


def disagreement(own: Tensor, common: Tensor) -> Tensor:
    """Share of the queries with an object for which a predictor, asked alone, would take another one.

    The members of an interval have the assignment of the first, so none of these conflicts is trained on;
    this is what they would suffer without it.

    Args:
        own, common: gt_index `(B, N)`, -1 for background.
    """
    involved = (own >= 0) | (common >= 0)
    return ((own != common) & involved).sum() / involved.sum().clamp(min=1)


def member_iou(boxes_xyxy: Tensor, first_xyxy: Tensor, gt_index: Tensor) -> Tensor:
    """Mean IoU between the boxes `(B, N, 4)` of two members for the queries that have an object."""
    has = gt_index >= 0
    return (paired_giou(boxes_xyxy, first_xyxy)[0] * has).sum() / has.sum().clamp(min=1)
