"""Inference of a flow classifier: one step carries M noise samples to class embeddings.

Shapes: B images, M noise samples, D blocks, E embedding dimensions, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfm_d2.errors import UserError
from dfm_d2.flow import LabelSpace, keyed_normal, stream_key


@dataclass(frozen=True)
class ClassSamplerSettings:
    """See the keys of MODEL.CLASSIFIER.SAMPLER."""

    samples: int = 4
    noise: float = 1.0
    blocks: Sequence[int] = ()
    weights: str = "confidence"
    seed: int = 0


class ClassSampler:
    """The noise, the blocks that answer, and the mean of their answers."""

    def __init__(self, settings: ClassSamplerSettings, readout_temperature: float):
        self.settings = settings
        self.readout_temperature = readout_temperature

    def noise(self, image_ids: Sequence[int | str], space: LabelSpace) -> Tensor:
        """x_0 `(B, M, E)`, of the seed and the image ids alone."""
        keys = [stream_key("classify", self.settings.seed, image_id) for image_id in image_ids]
        shape = self.settings.samples, space.weight.shape[1]
        return self.settings.noise * normals(keys, shape, space.weight)

    def blocks_of(self, num_blocks: int) -> list[int]:
        """The indices of the blocks that answer. UserError for one that is not there or named twice."""
        named = list(self.settings.blocks) or list(range(num_blocks))
        if not all(-num_blocks <= block < num_blocks for block in named):
            raise UserError(f"MODEL.CLASSIFIER.SAMPLER.BLOCKS names {named}, there are {num_blocks} blocks.")
        blocks = [block % num_blocks for block in named]
        if len(set(blocks)) < len(blocks):
            raise UserError(f"MODEL.CLASSIFIER.SAMPLER.BLOCKS {named} names a block of {num_blocks} twice.")
        return blocks

    def mean(self, endpoints: list[Tensor], space: LabelSpace) -> Tensor:
        """Of the blocks' endpoints `(B, M, E)` at one `x_t`; their mean velocity leads to it."""
        if len(endpoints) == 1:
            return endpoints[0]
        stacked = torch.stack(endpoints)
        if self.settings.weights == "uniform":
            return stacked.mean(0)
        probs = (space.logits(stacked) / self.readout_temperature).softmax(-1)
        weights = probs.amax(-1, keepdim=True)
        return (weights * stacked).sum(0) / weights.sum(0)


def normals(keys: Sequence[int], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normals `(len(keys), *shape)`, row i of `keys[i]`, of dtype and device of `like`."""
    count = math.prod(shape)
    drawn = keyed_normal(keys, -(-count // 4), device=like.device)
    return drawn.flatten(1)[:, :count].reshape(len(keys), *shape).to(like.dtype)
