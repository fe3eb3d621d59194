"""What every classifier has: images, labels, and probabilities.

Shapes: B images, S answers an image (noise samples, blocks), K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfm_d2.classification.backbone import SplitBackbone, build_split_backbone
from dfm_d2.errors import UserError
from dfm_d2.flow import stream_key
from dfm_d2.local_update import BlockLosses, HandOver


class PreparedImages(NamedTuple):
    """images: normalised `(B, C, H, W)`. labels: `(B,)`. keys: of the noise of each image in this step."""

    images: Tensor
    labels: Tensor
    keys: list[int]


class Classifier(nn.Module, ABC):
    """The base of the classifiers.

    backbone: split into blocks. num_classes: K. seed: of noise in training. temperature: of the read-out; a
    checkpoint may have another one. pixel_mean, pixel_std: per channel, in INPUT.FORMAT order.
    """

    # Buffers that weights to start a training from do not replace; a resume and an evaluation do.
    set_by_config = ("temperature",)
    # Keys that say what the weights mean and that their names and shapes do not show.
    meaning = ("MODEL.DFM.PREDICTION", "MODEL.CLASSIFIER.RADIUS", "MODEL.CLASSIFIER.POOL", "INPUT.IMAGE_SIZE")

    def __init__(
        self,
        *,
        backbone: SplitBackbone,
        num_classes: int,
        seed: int,
        temperature: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        super().__init__()
        self.backbone, self.num_classes, self.seed = backbone, num_classes, seed
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """The arguments that all classifiers have. UserError where MODEL.DFM.NUM_CLASSES is not filled in."""
        model = cfg.MODEL
        if model.DFM.NUM_CLASSES < 2:
            raise UserError(
                f"MODEL.DFM.NUM_CLASSES must be at least 2 for a classifier, got {model.DFM.NUM_CLASSES} "
                "(0 is filled in by tools/train_classifier.py): check the classes of the training set."
            )
        found = {"backbone": build_split_backbone(cfg), "num_classes": model.DFM.NUM_CLASSES}
        return found | {"seed": model.DFM.SEED, "pixel_mean": model.PIXEL_MEAN, "pixel_std": model.PIXEL_STD}

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def num_blocks(self) -> int:
        return self.backbone.num_blocks

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters of each block, "block0", ...: here those of the backbone."""
        blocks: dict[str, list] = {block_name(index): [] for index in range(self.num_blocks)}
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad:
                blocks[block_name(self.backbone.block_of(name))].append((f"backbone.{name}", parameter))
        return blocks

    @abstractmethod
    def class_logits(self, images: Tensor, image_ids: Sequence[int | str]) -> Tensor:
        """Logits `(B, S, K)` at temperature 1 of normalised images `(B, C, H, W)`."""

    @abstractmethod
    def block_losses(self, prepared, hand_over: HandOver) -> Iterator[BlockLosses]:
        """Block after block, see dfm_d2.local_update.LocallyTrainable."""

    def forward(self, batched_inputs: Sequence[dict]) -> list[dict]:
        """Class probabilities `[{"probs": (K,)}]`, which depend on nothing but image, image_id and seed.

        Raises RuntimeError in training mode, which needs an iteration to key its noise.
        """
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__}.forward is inference: train through dfm_d2.engine, or call eval()"
            )
        ids = [x.get("image_id", x.get("file_name", i)) for i, x in enumerate(batched_inputs)]
        with torch.no_grad():
            logits = self.class_logits(self.normalised(batched_inputs), ids)
        return [{"probs": probs} for probs in self.probabilities(logits)]

    def probabilities(self, logits: Tensor) -> Tensor:
        """`(B, S, K)` to `(B, K)`, float32 or more: the mean of `softmax(logits / T)` over the answers."""
        return (logits.to(self.pixel_mean.dtype) / self.temperature).softmax(-1).mean(1)

    def prepare(self, batched_inputs: Sequence[dict], iteration: int) -> PreparedImages:
        """Images and labels; keys of (seed, iteration, image id). UserError for a label outside [0, K)."""
        for item in batched_inputs:
            if not 0 <= item.get("label", -1) < self.num_classes:
                raise UserError(
                    f"training input {item.get('file_name')!r} has the label {item.get('label')}, not one of "
                    f"[0, {self.num_classes}): see MODEL.DFM.NUM_CLASSES"
                )
        labels = torch.tensor([item["label"] for item in batched_inputs], device=self.device)
        ids = [item.get("image_id", i) for i, item in enumerate(batched_inputs)]
        keys = [stream_key("train", self.seed, iteration, image_id) for image_id in ids]
        return PreparedImages(self.normalised(batched_inputs), labels, keys)

    def normalised(self, batched_inputs: Sequence[dict]) -> Tensor:
        """Normalised `(B, C, H, W)`; UserError where sizes differ, or are not what the backbone takes."""
        images = [item["image"] for item in batched_inputs]
        for item in batched_inputs:
            if item["image"].shape != images[0].shape:
                raise UserError(
                    f"{item.get('file_name')} has the shape {tuple(item['image'].shape)}, another image of "
                    f"its batch {tuple(images[0].shape)}: set INPUT.IMAGE_SIZE."
                )
        stacked = torch.stack(images).to(self.device)
        if stacked.shape[1] != self.pixel_mean.shape[0]:
            raise UserError(
                f"images have {stacked.shape[1]} channels, MODEL.PIXEL_MEAN {self.pixel_mean.shape[0]}"
            )
        self.backbone.check_images(stacked)
        return (stacked.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std


def block_name(index: int) -> str:
    """The name of a block: block0, block1, ..."""
    return f"block{index}"
