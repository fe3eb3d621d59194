"""FlowClassifier: each block of a backbone learns, by its own flow loss, to carry noise to the class.

Shapes: B images, S points of the path an image, M noise samples, D blocks, E embedding dimensions, K classes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dfm_d2.classification.backbone import block_outputs, build_split_backbone
from dfm_d2.classification.base import Classifier, block_name, classifier_arguments
from dfm_d2.classification.endpoint_predictor import ClassPredictor
from dfm_d2.classification.loss import EndpointLoss
from dfm_d2.classification.sampler import ClassSampler, ClassSamplerSettings, normals
from dfm_d2.errors import UserError
from dfm_d2.flow import CondOTPath, LabelSpace, PathSample, Trajectory, at_least_float32, keyed_uniform
from dfm_d2.flow.noise import STREAM_STAGE_TIME
from dfm_d2.framework import META_ARCH_REGISTRY, configurable
from dfm_d2.local_update import SHARED_BLOCK, BlockLosses, HandOver


class PreparedFlow(NamedTuple):
    """images: normalised. labels: `(B,)`. samples: of each block, its points `(B S, E)` of the path."""

    images: Tensor
    labels: Tensor
    samples: list[PathSample]


@META_ARCH_REGISTRY.register()
class FlowClassifier(Classifier):
    """Blocks with a flow predictor each; the input of a block is detached.

    Args (besides those of Classifier):
        label_space: the class embeddings. hidden_dim: of the predictors.
        criterion: the loss of a block. sampler: inference.
        prediction: "endpoint" or "velocity", what a predictor's answer is.
        noise_samples: S. time_power: p of `t = u^p`, u uniform. shuffle_x_0: see MODEL.CLASSIFIER.SHUFFLE_X0.
    """

    @configurable
    def __init__(
        self,
        *,
        label_space: LabelSpace,
        hidden_dim: int,
        criterion: EndpointLoss,
        sampler: ClassSampler,
        prediction: str = "endpoint",
        noise_samples: int = 1,
        time_power: float = 1.0,
        shuffle_x_0: bool = False,
        **common,
    ):
        super().__init__(temperature=criterion.temperature, **common)
        sampler.blocks_of(self.num_blocks)  # before training, not after it
        self.label_space = label_space
        self.criterion = criterion
        self.sampler = sampler
        self.prediction = prediction
        self.noise_samples = noise_samples
        self.time_power = time_power
        self.shuffle_x_0 = shuffle_x_0
        self.path = CondOTPath()
        embed_dim = label_space.weight.shape[1]
        self.block_predictors = nn.ModuleList(
            ClassPredictor(in_channels=channels, embed_dim=embed_dim, hidden_dim=hidden_dim)
            for channels in self.backbone.channels
        )

    @classmethod
    def from_config(cls, cfg) -> dict:
        c = cfg.MODEL.CLASSIFIER
        common = classifier_arguments(cfg, build_split_backbone(cfg))
        return common | {
            "label_space": build_label_space(c, common["num_classes"]),
            "hidden_dim": c.HIDDEN_DIM,
            "criterion": EndpointLoss(
                weighting=c.LOSS.WEIGHTING,
                velocity_max=cfg.MODEL.DFM.LOSS.VELOCITY_MAX,
                readout_weight=c.LOSS.READOUT_WEIGHT,
                temperature=c.LOSS.READOUT_TEMPERATURE,
            ),
            "sampler": ClassSampler(sampler_settings(c.SAMPLER), c.LOSS.READOUT_TEMPERATURE),
            "prediction": cfg.MODEL.DFM.PREDICTION,
            "noise_samples": c.NOISE_SAMPLES,
            "time_power": c.TIME_POWER,
            "shuffle_x_0": c.SHUFFLE_X0,
        }

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters of each block, "block0", ...; learned embeddings are "shared"."""
        blocks = self.backbone_blocks()
        for name, parameter in self.block_predictors.named_parameters():
            blocks[block_name(int(name.split(".")[0]))].append((f"block_predictors.{name}", parameter))
        learned = [
            (f"label_space.{name}", parameter) for name, parameter in self.label_space.named_parameters()
        ]
        return blocks | ({SHARED_BLOCK: learned} if learned else {})

    @torch.no_grad()
    def prepare(self, batched_inputs: Sequence[dict], iteration: int) -> PreparedFlow:
        """Images, labels and S points of the path for every block.

        Noise and t depend on (seed, iteration, image id, block), and on nothing else.
        """
        images, labels, keys = super().prepare(batched_inputs, iteration)
        x_1 = self.label_space.encode(labels)
        shape = self.num_blocks, self.noise_samples
        x_0 = normals(keys, (*shape, x_1.shape[1]), x_1)
        u = keyed_uniform(keys, shape[0] * shape[1], STREAM_STAGE_TIME, self.device).view(-1, *shape)
        t = u**self.time_power
        x_1 = x_1[:, None].expand_as(x_0[:, 0]).flatten(0, 1)
        samples = [
            self.path.sample(x_0[:, d].flatten(0, 1), x_1, t[:, d].flatten()) for d in range(self.num_blocks)
        ]
        return PreparedFlow(images, labels, samples)

    def block_losses(self, prepared: PreparedFlow, hand_over: HandOver) -> Iterator[BlockLosses]:
        """Block after block, each on the detached output of the one before."""
        x = prepared.images
        for index in range(self.num_blocks):
            x = self.backbone.forward_block(index, x)
            losses = self._losses(index, self.backbone.pooled(x), prepared)
            x = x.detach()
            yield BlockLosses((block_name(index),), losses)
            del losses

    def _losses(self, index: int, pooled: Tensor, prepared: PreparedFlow) -> dict[str, Tensor]:
        """The local loss of a block, and the share of its points that it reads out right."""
        sample = prepared.samples[index]
        shape = len(prepared.labels), self.noise_samples
        x_t, t = sample.x_t.unflatten(0, shape), sample.t.view(shape)
        x_1_hat = self._endpoint(index, pooled, x_t, t)
        target = sample.x_1.unflatten(0, shape)
        if self.shuffle_x_0:
            wrong = (sample.x_1 - sample.x_0.unflatten(0, shape).roll(1, 0).flatten(0, 1)).unflatten(0, shape)
            target = x_t + (1 - t)[..., None] * wrong
        embeddings = self.label_space.embeddings.to(x_1_hat.dtype)
        losses = self.criterion(x_1_hat, target, t, embeddings, prepared.labels)
        name = block_name(index)
        right = self.label_space.decode(x_1_hat.detach()) == prepared.labels[:, None]
        found = {f"loss_{key}/{name}": value for key, value in losses.items()}
        return found | {f"right/{name}": right.to(x_1_hat.dtype).mean()}

    def _endpoint(self, index: int, pooled: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The endpoint `(B, S, E)` of a block, from pooled `(B, C)`, `x_t` `(B, S, E)` and t `(B, S)`."""
        answer = at_least_float32(self.block_predictors[index](pooled, x_t, t)).to(x_t.dtype)
        if self.prediction == "velocity":
            return x_t + (1 - t)[..., None] * answer
        return answer

    # --------------------------------------------------------------- inference

    def class_logits(self, images: Tensor, image_ids: Sequence[int | str]) -> Tensor:
        """Logits `(B, M, K)`, with aggregation "probability" `(B, M D, K)`."""
        return self.flow_logits(block_outputs(self.backbone, images), image_ids)

    def flow_logits(self, pooled: Sequence[Tensor], image_ids: Sequence[int | str]) -> Tensor:
        """Those of the pooled outputs `(B, C_d)` of every block, which serve many samplers."""
        ends = [trajectory.x for trajectory in self.trajectories(pooled, image_ids)]
        return self.label_space.logits(torch.cat(ends, 1))

    @torch.no_grad()
    def trajectories(
        self, pooled: Sequence[Tensor], image_ids: Sequence[int | str], keep: bool = False
    ) -> list[Trajectory]:
        """The flows of images by their blocks' pooled outputs, see block_outputs and ClassSampler.sample."""

        def endpoint(index: int, x_t: Tensor, t: Tensor) -> Tensor:
            return self._endpoint(index, pooled[index], x_t, t)

        x_0 = self.sampler.noise(image_ids, self.label_space)
        return self.sampler.sample(endpoint, self.num_blocks, x_0, self.label_space, keep)


def sampler_settings(sampler) -> ClassSamplerSettings:
    """The settings of a node MODEL.CLASSIFIER.SAMPLER."""
    return ClassSamplerSettings(
        steps=sampler.STEPS,
        samples=sampler.SAMPLES,
        method=sampler.METHOD,
        noise=sampler.NOISE,
        blocks=tuple(sampler.BLOCKS),
        aggregation=sampler.AGGREGATION,
        weights=sampler.WEIGHTS,
        seed=sampler.SEED,
    )


def build_label_space(classifier, num_classes: int) -> LabelSpace:
    """The class embeddings of a node MODEL.CLASSIFIER.

    Raises:
        UserError: a dimension below K, or a file that does not have K rows of numbers.
    """
    dim = classifier.EMBED_DIM or max(num_classes, 16)
    if classifier.EMBEDDING == "orthonormal":
        if dim < num_classes:
            raise UserError(
                f"MODEL.CLASSIFIER.EMBED_DIM is {dim}, but {num_classes} orthonormal classes need as many "
                "dimensions or more: set it to 0, or EMBEDDING to learned."
            )
        return LabelSpace.orthonormal(num_classes, dim, radius=classifier.RADIUS)
    if classifier.EMBEDDING == "learned":
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(num_classes, dim, generator=generator)
        return LabelSpace(start, learned=True, radius=classifier.RADIUS)
    path = Path(classifier.EMBEDDING_FILE)
    try:
        matrix = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, ndmin=2)
        if matrix.dtype.kind not in "fiu":
            raise ValueError(f"its entries are of the type {matrix.dtype}")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"MODEL.CLASSIFIER.EMBEDDING_FILE {path} is no matrix of numbers: {error}") from error
    if matrix.ndim != 2 or len(matrix) != num_classes:
        raise UserError(
            f"MODEL.CLASSIFIER.EMBEDDING_FILE {path} has the shape {matrix.shape}: give one row for each of "
            f"the {num_classes} classes, in their order."
        )
    if len(np.unique(matrix, axis=0)) < num_classes:
        raise UserError(
            f"MODEL.CLASSIFIER.EMBEDDING_FILE {path} has equal rows: their classes cannot be told apart."
        )
    try:
        return LabelSpace(torch.as_tensor(matrix, dtype=torch.float32), radius=classifier.RADIUS)
    except ValueError as error:
        raise UserError(f"MODEL.CLASSIFIER.EMBEDDING_FILE {path}: {error}") from error
