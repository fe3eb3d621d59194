"""An exported file as if it were the detector: for evaluation, and to compare.

Shapes: B images, N noise boxes of all passes, L detections of an image.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dfm_d2.detection.detector import FlowDetector
from dfm_d2.detection.sampler import initial_noise
from dfm_d2.export.load import load_file
from dfm_d2.framework import Boxes, Instances, detector_postprocess

# Boxes (L, 4) in pixels of the image as the network saw it, scores (L,), classes (L,).
_Found = tuple[Tensor, Tensor, Tensor]


class ExportedDetector(nn.Module):
    """Takes and returns what FlowDetector does: `[{"image", "image_id", ...}]` to `[{"instances"}]`.

    The noise of an image is what the detector draws for its id; in a file with constant noise, the constant.

    Attributes:
        about: the file's metadata.
    """

    def __init__(self, path: str | Path):
        """path: a file that export_detector wrote. Raises as dfm_d2.export.load.load_file."""
        super().__init__()
        self._run, self.about = load_file(path)

    def forward(self, batched_inputs: Sequence[dict], x_0: Tensor | None = None) -> list[dict]:
        """Detections in original image coordinates. x_0: `(B, N, 4)`; None: of the images' ids.

        Raises:
            ValueError: noise for a file that has its own, or of another shape.
        """
        if not batched_inputs:
            return []
        shape = len(batched_inputs), self.about["num_noise_boxes"], 4
        if self.about["noise"] == "constant":
            if x_0 is not None:
                raise ValueError("this file has constant noise and takes none")
        elif x_0 is None:
            passes = self.about["noise_passes"]
            ids = FlowDetector.image_ids(batched_inputs)
            x_0 = initial_noise(ids, self.about["seed"], shape[1] // passes, passes)
        elif tuple(x_0.shape) != shape:
            raise ValueError(f"x_0 has the shape {tuple(x_0.shape)}, this file takes {shape}")
        images = [item["image"].float() for item in batched_inputs]
        # A trace has batch 1.
        run = self._one_by_one if self.about["file_format"] == "torchscript" else self._batch
        return [_answer(item, *found) for item, found in zip(batched_inputs, run(images, x_0))]

    def _one_by_one(self, images: Sequence[Tensor], x_0: Tensor | None) -> Iterator[_Found]:
        for place, image in enumerate(images):
            noise = {} if x_0 is None else {"x_0": x_0[place]}
            # Fields of Instances in the order of their names: boxes, classes, scores; then the image size.
            boxes, classes, scores, _ = self._run({"image": image} | noise)
            yield boxes, scores, classes

    def _batch(self, images: Sequence[Tensor], x_0: Tensor | None) -> Iterator[_Found]:
        """Images in the upper left corners of `(B, 3, H, W)`."""
        sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.float32)
        unit, least = self.about["divisibility"], self.about["min_side"]
        sides = (max(-(-int(side) // unit) * unit, least) for side in sizes.amax(0))
        padded = torch.zeros(len(images), 3, *sides)
        for place, image in zip(padded, images):
            place[:, : image.shape[1], : image.shape[2]] = image
        noise = {} if x_0 is None else {"x_0": x_0}
        for *found, count in zip(*self._run({"images": padded, "image_sizes": sizes} | noise)):
            yield tuple(values[: int(count)] for values in found)


def _answer(item: dict, boxes: Tensor, scores: Tensor, classes: Tensor) -> dict:
    height, width = item["image"].shape[1:]
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(boxes.clone())
    instances.scores = scores
    instances.pred_classes = classes
    whole = (item.get("height", height), item.get("width", width))
    return {"instances": detector_postprocess(instances, *whole)}
