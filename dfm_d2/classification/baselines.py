"""The baselines, on the same backbones: backprop from a head on the last block or on all of them (deep
supervision, arXiv 1409.5185), and Hinton's Forward-Forward (arXiv 2212.13345).

A block of Forward-Forward learns to answer images with their own label strongly and those with a wrong one
weakly. Labels are drawn over the whole image as waves (arXiv 2312.14924), which convolutions see everywhere.
Shapes: B images, C channels, H x W pixels, K classes.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from dfm_d2.classification.base import Classifier, PreparedImages, block_name
from dfm_d2.flow import at_least_float32, keyed_uniform
from dfm_d2.flow.noise import STREAM_NEGATIVE
from dfm_d2.framework import META_ARCH_REGISTRY, configurable
from dfm_d2.local_update import SHARED_BLOCK, BlockLosses, HandOver

_WAVELENGTHS = (3.0, 6.0)  # of the labels, in pixels, in turns


@META_ARCH_REGISTRY.register()
class BackpropClassifier(Classifier):
    """Cross-entropy of a linear layer on the pooled output of the last block, one backward through all.

    deep_supervision: other blocks have such layers, too. The other arguments are those of Classifier.
    """

    @configurable
    def __init__(self, *, deep_supervision: bool, **common):
        super().__init__(temperature=1.0, **common)
        supervised = self.backbone.channels if deep_supervision else self.backbone.channels[-1:]
        self.heads = nn.ModuleList(nn.Linear(channels, self.num_classes) for channels in supervised)

    @classmethod
    def from_config(cls, cfg) -> dict:
        return super().from_config(cfg) | {"deep_supervision": cfg.UPDATE.METHOD == "deep_supervision"}

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """One block, "shared": gradients pass through everything."""
        return {SHARED_BLOCK: [(name, p) for name, p in self.named_parameters() if p.requires_grad]}

    def block_losses(self, prepared: PreparedImages, hand_over: HandOver) -> Iterator[BlockLosses]:
        """One item, of everything."""
        losses = {}
        for index, logits in enumerate(self._logits(prepared.images), self.num_blocks - len(self.heads)):
            name, right = block_name(index), logits.detach().argmax(-1) == prepared.labels
            losses[f"loss_readout/{name}"] = cross_entropy(logits, prepared.labels)
            losses[f"right/{name}"] = right.to(logits.dtype).mean()
        yield BlockLosses((SHARED_BLOCK,), losses)

    def _logits(self, images: Tensor) -> list[Tensor]:
        """`(B, K)` of each head."""
        pooled = self.backbone(images)[-len(self.heads) :]
        return [at_least_float32(head(x)) for head, x in zip(self.heads, pooled)]

    def class_logits(self, images: Tensor, image_ids: Sequence[int | str]) -> Tensor:
        return self._logits(images)[-1][:, None]


@META_ARCH_REGISTRY.register()
class ForwardForwardClassifier(Classifier):
    """Goodness of a block: the mean square of its pooled output. Its input is detached and normalised.

    Args (besides those of Classifier):
        threshold, sharpness, label_scale: see the keys of MODEL.CLASSIFIER.FF.
    """

    @configurable
    def __init__(self, *, threshold: float, sharpness: float, label_scale: float, **common):
        super().__init__(temperature=1.0, **common)
        self.threshold, self.sharpness, self.label_scale = threshold, sharpness, label_scale

    @classmethod
    def from_config(cls, cfg) -> dict:
        options = {name.lower(): value for name, value in cfg.MODEL.CLASSIFIER.FF.items()}
        return super().from_config(cfg) | options

    @torch.no_grad()
    def prepare(self, batched_inputs: Sequence[dict], iteration: int) -> PreparedImages:
        """Images `(2 B, C, H, W)`, with their own and then with a wrong label, drawn by the keys."""
        images, labels, keys = super().prepare(batched_inputs, iteration)
        drawn = keyed_uniform(keys, 1, STREAM_NEGATIVE, self.device)[:, 0]
        wrong = (labels + 1 + (drawn * (self.num_classes - 1)).long()) % self.num_classes
        pair = torch.cat([self.labelled(images, labels), self.labelled(images, wrong)])
        return PreparedImages(pair, labels, keys)

    def labelled(self, images: Tensor, labels: Tensor) -> Tensor:
        """Normalised images `(B, C, H, W)` with the waves of labels `(B,)` added."""
        like = {"device": images.device, "dtype": images.dtype}
        down, right = (torch.arange(side, **like) for side in images.shape[-2:])
        angles = math.pi * labels.to(images.dtype) / self.num_classes
        lengths = torch.tensor(_WAVELENGTHS, **like)
        frequency = 2 * math.pi / lengths[labels % len(_WAVELENGTHS)]
        across = angles.cos()[:, None, None] * right + angles.sin()[:, None, None] * down[:, None]
        waves = math.sqrt(2) * torch.sin(frequency[:, None, None] * across)
        return images + self.label_scale * waves[:, None]

    def block_losses(self, prepared: PreparedImages, hand_over: HandOver) -> Iterator[BlockLosses]:
        """Block after block, each on the detached output of the one before."""
        for index, goodness in enumerate(self._goodness(prepared.images)):
            yield BlockLosses((block_name(index),), self._losses(index, goodness))

    def _losses(self, index: int, goodness: Tensor) -> dict[str, Tensor]:
        own, wrong = (self.sharpness * (g - self.threshold) for g in goodness.chunk(2))
        name = block_name(index)
        right = (own > wrong).to(own.dtype).mean()
        return {f"loss_goodness/{name}": (softplus(-own) + softplus(wrong)).mean(), f"right/{name}": right}

    def _goodness(self, x: Tensor):
        """The goodness `(B,)` of block after block."""
        for index in range(self.num_blocks):
            x = self.backbone.forward_block(index, x)
            goodness = at_least_float32(self.backbone.pooled(x)).square().mean(1)
            x = x.detach()
            yield goodness
            x = unit_square(x)

    @torch.no_grad()
    def class_logits(self, images: Tensor, image_ids: Sequence[int | str]) -> Tensor:
        """Logits `(B, 1, K)`: goodness of all blocks but the first under every label, one pass a label."""
        columns = []
        for label in range(self.num_classes):
            labels = torch.full((len(images),), label, device=images.device)
            found = list(self._goodness(self.labelled(images, labels)))
            columns.append(torch.stack(found[1:] or found).sum(0))
        return self.sharpness * torch.stack(columns, -1)[:, None]


def unit_square(x: Tensor) -> Tensor:
    """`x` `(B, ...)` with the mean square 1 of each image, so that a block cannot hand its goodness on."""
    square = at_least_float32(x).square().flatten(1).mean(1).clamp(min=1e-8)
    return (x * square.rsqrt().view(-1, *[1] * (x.dim() - 1))).to(x.dtype)
