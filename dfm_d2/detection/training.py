"""What a training step of the detectors needs besides the model.

Shapes: B images, N proposals, D predictors, S backbone stages with a predictor of their own, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfm_d2.detection.assignment import DynamicK
from dfm_d2.detection.ground_truth import GroundTruth
from dfm_d2.flow import BoxSpace, PathSample
from dfm_d2.framework import ImageList
from dfm_d2.local_update.processes import max_over_processes, world_size


class Prepared(NamedTuple):
    """All that one training step needs, without gradients; nothing changes it.

    images: padded, normalised. image_sizes: `(B, 2)` height, width. ground_truth: padded.
    samples: the path sample of every predictor. on_policy: `(B,)` bool, the images on which a predictor
    trains where the one before it leads, in place of its path sample.
    gt_index: the coupled (or, for TIME "shared" with dynamic_k, the predictor-independent) assignment
    `(B, N)`; None where each predictor assigns.
    stage_samples: the path sample of every backbone stage that is a block; there are none but with
    BACKBONE_UPDATE "local".
    """

    images: ImageList
    image_sizes: Tensor
    ground_truth: GroundTruth
    samples: list[PathSample]
    on_policy: Tensor
    gt_index: Tensor | None
    stage_samples: list[PathSample]

    def part(self, images: slice) -> "Prepared":
        """The same of some of the images; their padding stays what it is."""

        def rows(sample: PathSample) -> PathSample:
            return PathSample(*(value[images] for value in sample))

        return Prepared(
            ImageList(self.images.tensor[images], self.images.image_sizes[images]),
            self.image_sizes[images],
            GroundTruth(*(value[images] for value in self.ground_truth)),
            [rows(sample) for sample in self.samples],
            self.on_policy[images],
            None if self.gt_index is None else self.gt_index[images],
            [rows(sample) for sample in self.stage_samples],
        )


def of_common_size(images: ImageList) -> ImageList:
    """The images padded as those of all processes together would be: what is beyond an image shows in it."""
    height, width = images.tensor.shape[-2:]
    size = torch.tensor([height, width], device=images.tensor.device)
    extra = (max_over_processes(size) - size).tolist() if world_size() > 1 else [0, 0]
    if not any(extra):
        return images
    return ImageList(torch.nn.functional.pad(images.tensor, (0, extra[1], 0, extra[0])), images.image_sizes)


def pad_ground_truth(
    batched_inputs: Sequence[dict], image_sizes: Tensor, space: BoxSpace, num_classes: int
) -> GroundTruth:
    """The boxes of a batch in signal space, on the device of `image_sizes` `(B, 2)`.

    Raises:
        ValueError: an input without "instances", or with a class outside [0, K); the message names it.
    """
    x_1, classes = [], []
    for index, (item, size) in enumerate(zip(batched_inputs, image_sizes)):
        if "instances" not in item:
            raise ValueError(
                f"training input {item.get('file_name', index)!r} has no 'instances' to learn from"
            )
        instances = item["instances"].to(image_sizes.device)
        labels = instances.gt_classes
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"{item.get('file_name', index)!r} has a class outside [0, {num_classes}): "
                "set MODEL.DFM.NUM_CLASSES to the data set's number of classes"
            )
        x_1.append(space.encode(instances.gt_boxes.tensor.to(size.dtype), size))
        classes.append(labels)
    return GroundTruth.pad(x_1, classes)


@torch.no_grad()
def disagreement(assigner: DynamicK, prepared: Prepared, class_logits: Tensor, x_1_hat: Tensor) -> Tensor:
    """Share of the queries with an object for which a predictor, asked alone, would take another one.

    Averaged predictors have one common assignment (`prepared.gt_index`), so none of these conflicts is
    trained on; this is what they would suffer without it.

    Args:
        class_logits: `(B, N, K)`. x_1_hat: `(B, N, 4)` signal, both of one predictor.
    """
    own, common = assigner(prepared.ground_truth, x_1_hat, class_logits), prepared.gt_index
    involved = (own >= 0) | (common >= 0)
    return ((own != common) & involved).sum() / involved.sum().clamp(min=1)
