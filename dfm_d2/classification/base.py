"""What every classifier has: images, labels, and calibrated probabilities.

Shapes: B images, S answers an image (noise samples, blocks), K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dfm_d2.classification.backbone import SplitBackbone
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

    Args:
        backbone: split into blocks. num_classes: K. seed: of noise in training.
        temperature: of the read-out, until fit_temperature finds a better one.
        pixel_mean, pixel_std: per channel, in INPUT.FORMAT order.
    """

    is_local = True
    # Buffers that weights to start a training from do not replace; a resume and an evaluation do.
    set_by_config = ("temperature",)

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
        self.backbone = backbone
        self.num_classes = num_classes
        self.seed = seed
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def num_blocks(self) -> int:
        return self.backbone.num_blocks

    def backbone_blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters, by full name, of each block of the backbone, "block0", ..."""
        blocks: dict[str, list] = {block_name(index): [] for index in range(self.num_blocks)}
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad:
                index = self.backbone.block_of(name)
                blocks[block_name(index)].append((f"backbone.{name}", parameter))
        return blocks

    @abstractmethod
    def class_logits(self, images: Tensor, image_ids: Sequence[int | str]) -> Tensor:
        """Logits `(B, S, K)` at temperature 1 of normalised images `(B, C, H, W)`."""

    @abstractmethod
    def block_losses(self, prepared, hand_over: HandOver) -> Iterator[BlockLosses]:
        """Block after block, see dfm_d2.local_update.LocallyTrainable."""

    def forward(self, batched_inputs: Sequence[dict]) -> list[dict]:
        """Class probabilities `[{"probs": (K,)}]`, which depend on nothing but image, image_id and seed.

        Raises:
            RuntimeError: in training mode, which needs an iteration to key its noise.
        """
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__}.forward is inference: train through dfm_d2.engine, or call eval()"
            )
        return [{"probs": probs} for probs in self.probabilities(self.logits_of(batched_inputs))]

    @torch.no_grad()
    def logits_of(self, batched_inputs: Sequence[dict]) -> Tensor:
        """Logits `(B, S, K)` at temperature 1, float32 or more."""
        ids = [x.get("image_id", x.get("file_name", i)) for i, x in enumerate(batched_inputs)]
        logits = self.class_logits(self.normalised(batched_inputs), ids)
        return logits.to(self.pixel_mean.dtype)

    def probabilities(self, logits: Tensor) -> Tensor:
        """`(B, S, K)` to `(B, K)`: the mean of `softmax(logits / T)` over the answers."""
        return (logits / self.temperature).softmax(-1).mean(1)

    def fit_temperature(self, logits: Tensor, labels: Tensor) -> float:
        """Set the temperature to the one of greatest likelihood (arXiv 1706.04599, section 4.2).

        Args:
            logits: `(n, S, K)` at temperature 1 of images that were not trained on. labels: `(n,)`.
        """
        from scipy.optimize import minimize_scalar

        logits, labels = logits.double().cpu(), labels.cpu()

        def loss(log_temperature: float) -> float:
            probs = (logits / np.exp(log_temperature)).softmax(-1).mean(1)
            return -float(probs.gather(1, labels[:, None]).clamp(min=1e-12).log().mean())

        found = minimize_scalar(loss, bounds=(np.log(1e-3), np.log(1e2)), method="bounded")
        self.temperature.fill_(float(np.exp(found.x)))
        return float(self.temperature)

    # ---------------------------------------------------------------- training

    def prepare(self, batched_inputs: Sequence[dict], iteration: int) -> PreparedImages:
        """Images and labels; keys of (seed, iteration, image id).

        Raises:
            ValueError: an input without a label, or with one outside [0, K).
        """
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
        """Normalised `(B, C, H, W)`; ValueError where sizes differ, or are not what the backbone takes."""
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


def classifier_arguments(cfg, backbone: SplitBackbone) -> dict:
    """The arguments that all classifiers have.

    Raises:
        ValueError: MODEL.DFM.NUM_CLASSES is not filled in.
    """
    if cfg.MODEL.DFM.NUM_CLASSES < 2:
        raise UserError(
            f"MODEL.DFM.NUM_CLASSES must be at least 2 for a classifier, got {cfg.MODEL.DFM.NUM_CLASSES} "
            "(0 is filled in by tools/train_classifier.py): check the classes of the training set."
        )
    return {
        "backbone": backbone,
        "num_classes": cfg.MODEL.DFM.NUM_CLASSES,
        "seed": cfg.MODEL.DFM.SEED,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }
