"""FlowClassifier: each block of a backbone learns, by its own flow loss, to carry noise to the class.

Shapes: B images, S points of the path an image, M noise samples, D blocks, E embedding dimensions, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, silu

from dfm_d2.classification.base import Classifier, block_name
from dfm_d2.classification.sampler import ClassSampler, ClassSamplerSettings, normals
from dfm_d2.errors import UserError
from dfm_d2.flow import CondOTPath, LabelSpace, PathSample, at_least_float32, keyed_uniform, time_like
from dfm_d2.flow.noise import STREAM_STAGE_TIME
from dfm_d2.flow.time_embedding import TimeEmbedding
from dfm_d2.framework import META_ARCH_REGISTRY, configurable
from dfm_d2.local_update import SHARED_BLOCK, BlockLosses, HandOver


class ClassPredictor(nn.Module):
    """Two residual layers, the second modulated by the time. in_channels: C. embed_dim: E."""

    def __init__(self, *, in_channels: int, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(in_channels)
        self.features = nn.Linear(in_channels, hidden_dim)
        self.state = nn.Linear(embed_dim, hidden_dim)
        self.time_embedding = TimeEmbedding(hidden_dim)
        self.time_modulation = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.norm_hidden, self.hidden = nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        self.norm_out, self.answer = nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, embed_dim)
        nn.init.zeros_(self.time_modulation.weight)  # begin as a predictor that ignores the time
        nn.init.zeros_(self.time_modulation.bias)
        # Begin near the middle of the classes: an answer of the length of noise is wrong, and sure of it.
        nn.init.normal_(self.answer.weight, std=0.01)
        nn.init.zeros_(self.answer.bias)

    def forward(self, features: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The raw answer `(B, S, E)` to features `(B, C)`, x_t `(B, S, E)` and t `(B, S)` in [0, 1]."""
        dtype = self.features.weight.dtype
        seen = self.features(gelu(self.norm_in(features.to(dtype))))
        stream = seen[:, None] + self.state(x_t.to(dtype))
        time = self.time_embedding(t.reshape(-1)).view(*t.shape, -1)
        scale, shift = self.time_modulation(silu(time)).chunk(2, dim=-1)
        stream = stream + gelu(self.hidden(self.norm_hidden(stream) * (1 + scale) + shift))
        return self.answer(self.norm_out(stream))


@dataclass(frozen=True)
class EndpointLoss:
    """`mean |x_1_hat - x_1|^2 + w_r CE(<x_1_hat, e_k> / T)` (docs/classification.md, equation 3).

    readout_weight: w_r; 0 leaves the term out. temperature: T.
    """

    readout_weight: float = 1.0
    temperature: float = 0.1

    def __call__(
        self, x_1_hat: Tensor, target: Tensor, embeddings: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Weighted scalars "flow" and "readout".

        x_1_hat, target: `(B, S, E)`. embeddings: `(K, E)`. labels: `(B,)`.
        """
        # Detached: learned embeddings must not come to their endpoints, where all would be one.
        losses = {"flow": (x_1_hat - target.detach()).square().sum(-1).mean()}
        if self.readout_weight > 0:
            logits = x_1_hat @ embeddings.T / self.temperature
            repeated = labels[:, None].expand(-1, x_1_hat.shape[1])
            losses["readout"] = self.readout_weight * cross_entropy(logits.flatten(0, 1), repeated.flatten())
        return losses


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
        noise_samples: int = 1,
        time_power: float = 1.0,
        shuffle_x_0: bool = False,
        **common,
    ):
        super().__init__(temperature=criterion.temperature, **common)
        sampler.blocks_of(self.num_blocks)  # before training, not after it
        self.label_space, self.criterion, self.sampler = label_space, criterion, sampler
        self.noise_samples, self.time_power, self.shuffle_x_0 = noise_samples, time_power, shuffle_x_0
        self.path = CondOTPath()
        embed_dim = label_space.weight.shape[1]
        self.block_predictors = nn.ModuleList(
            ClassPredictor(in_channels=channels, embed_dim=embed_dim, hidden_dim=hidden_dim)
            for channels in self.backbone.channels
        )

    @classmethod
    def from_config(cls, cfg) -> dict:
        c = cfg.MODEL.CLASSIFIER
        common = super().from_config(cfg)
        settings = ClassSamplerSettings(**{name.lower(): value for name, value in c.SAMPLER.items()})
        return common | {
            "label_space": build_label_space(c, common["num_classes"]),
            "hidden_dim": c.HIDDEN_DIM,
            "criterion": EndpointLoss(c.LOSS.READOUT_WEIGHT, c.LOSS.READOUT_TEMPERATURE),
            "sampler": ClassSampler(settings, c.LOSS.READOUT_TEMPERATURE),
            "noise_samples": c.NOISE_SAMPLES,
            "time_power": c.TIME_POWER,
            "shuffle_x_0": c.SHUFFLE_X0,
        }

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters of each block, "block0", ...; learned embeddings are "shared"."""
        blocks = super().blocks()
        for name, parameter in self.block_predictors.named_parameters():
            blocks[block_name(int(name.split(".")[0]))].append((f"block_predictors.{name}", parameter))
        learned = [(f"label_space.{name}", p) for name, p in self.label_space.named_parameters()]
        return blocks | ({SHARED_BLOCK: learned} if learned else {})

    @torch.no_grad()
    def prepare(self, batched_inputs: Sequence[dict], iteration: int) -> PreparedFlow:
        """Images, labels and S points of the path for every block, by (seed, iteration, image id, block)."""
        images, labels, keys = super().prepare(batched_inputs, iteration)
        x_1, shape = self.label_space.encode(labels), (self.num_blocks, self.noise_samples)
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
        sample, shape = prepared.samples[index], (len(prepared.labels), self.noise_samples)
        x_0, x_1, x_t = (x.unflatten(0, shape) for x in (sample.x_0, sample.x_1, sample.x_t))
        t, target = sample.t.view(shape), x_1
        x_1_hat = self._endpoint(index, pooled, x_t, t)
        if self.shuffle_x_0:
            target = x_t + (1 - t)[..., None] * (x_1 - x_0.roll(1, 0))
        embeddings = self.label_space.embeddings.to(x_1_hat.dtype)
        losses = self.criterion(x_1_hat, target, embeddings, prepared.labels)
        name = block_name(index)
        right = self.label_space.decode(x_1_hat.detach()) == prepared.labels[:, None]
        found = {f"loss_{key}/{name}": value for key, value in losses.items()}
        return found | {f"right/{name}": right.to(x_1_hat.dtype).mean()}

    def _endpoint(self, index: int, pooled: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The endpoint `(B, S, E)` of a block, from pooled `(B, C)`, `x_t` `(B, S, E)` and t `(B, S)`."""
        return at_least_float32(self.block_predictors[index](pooled, x_t, t)).to(x_t.dtype)

    def class_logits(self, images: Tensor, image_ids: Sequence[int | str]) -> Tensor:
        """Logits `(B, M, K)`."""
        return self.pooled_logits(self.backbone(images), image_ids)

    def pooled_logits(self, pooled: Sequence[Tensor], image_ids: Sequence[int | str]) -> Tensor:
        """Logits `(B, M, K)`: one step from the noise to t = 1 ends at the endpoint.

        pooled: the outputs `(B, C_d)` of every block.
        """
        x_0 = self.sampler.noise(image_ids, self.label_space)
        return self.label_space.logits(self.mean_endpoint(pooled, x_0, time_like(x_0, 0.0)))

    @torch.no_grad()
    def mean_endpoint(self, pooled: Sequence[Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """The mean `(B, M, E)` of the answers of the sampler's blocks to `x_t` `(B, M, E)` at t `(B,)`."""
        times, blocks = t[:, None].expand(x_t.shape[:2]), self.sampler.blocks_of(self.num_blocks)
        answers = [self._endpoint(index, pooled[index], x_t, times) for index in blocks]
        return self.sampler.mean(answers, self.label_space)


def build_label_space(classifier, num_classes: int) -> LabelSpace:
    """The class embeddings of a node MODEL.CLASSIFIER. UserError for K orthonormal ones in less than K."""
    dim = classifier.EMBED_DIM or max(num_classes, 16)
    if classifier.EMBEDDING == "learned":
        start = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
        return LabelSpace(start, learned=True, radius=classifier.RADIUS)
    if dim < num_classes:
        raise UserError(
            f"MODEL.CLASSIFIER.EMBED_DIM is {dim}, but {num_classes} orthonormal classes need as many "
            "dimensions or more: set it to 0, or EMBEDDING to learned."
        )
    return LabelSpace.orthonormal(num_classes, dim, radius=classifier.RADIUS)
