"""FlowDetector as a function of tensors, of static shapes but for what NMS keeps inside of it.

Shapes: B images, N noise boxes of all passes, L detections of an image at most.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dfm_d2.detection.detector import FlowDetector
from dfm_d2.detection.postprocess import padded_detections

# The id that stands for every image where the noise is a constant of the file.
CONSTANT_ID = "export"


def constant_noise(model: FlowDetector) -> Tensor:
    """`x_0` `(1, N, 4)` of MODEL.DFM.SAMPLER.SEED, the same for every image."""
    return model.sampler.noise([CONSTANT_ID], model.device)


class ConstantNoise(nn.Module):
    """The detector with the noise of a file exported with constant noise; takes and returns what it does."""

    def __init__(self, model: FlowDetector):
        super().__init__()
        self.model = model

    def forward(self, batched_inputs: Sequence[dict]) -> list[dict]:
        x_0 = constant_noise(self.model)
        return self.model.inference(batched_inputs, x_0.expand(len(batched_inputs), -1, -1))


class TensorDetector(nn.Module):
    """`forward(images, image_sizes, x_0)`, or without `x_0` where the noise is a constant.

    Args:
        model: in evaluation mode.
        constant: whether the noise is a constant.
    """

    def __init__(self, model: FlowDetector, constant: bool):
        super().__init__()
        self.model = model
        self.register_buffer("noise", constant_noise(model) if constant else None)

    def forward(
        self, images: Tensor, image_sizes: Tensor, x_0: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detections of a batch.

        Args:
            images: `(B, 3, H, W)` float32 pixels 0 to 255 in the order of INPUT.FORMAT, each in the upper
                left corner; H and W multiples of the backbone's `size_divisibility`.
            image_sizes: `(B, 2)` float32 height and width without the padding.
            x_0: `(B, N, 4)` standard normal.

        Returns:
            boxes `(B, L, 4)` pixels xyxy, scores `(B, L)`, classes `(B, L)` int64, count `(B,)` int64; see
            dfm_d2.detection.postprocess.PaddedDetections.
        """
        if self.noise is not None:
            x_0 = self.noise.expand(images.shape[0], -1, -1)
        model = self.model
        rows = torch.arange(images.shape[2], device=images.device) < image_sizes[:, :1]
        columns = torch.arange(images.shape[3], device=images.device) < image_sizes[:, 1:]
        # The detector pads what is normalised already: there the padding is zero.
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        pixels = (images - model.pixel_mean) / model.pixel_std * inside
        candidates = model.candidates(pixels, image_sizes, [], x_0)
        return tuple(padded_detections(candidates, model.space, image_sizes, model.sampler.settings))
