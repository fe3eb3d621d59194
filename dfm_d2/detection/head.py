"""One predictor: a time-conditioned head on regions of interest.

Self-attention among queries, interaction of each query with its RoI features and a feed-forward that the
time modulates, after Sparse R-CNN (arXiv 2011.12450, section 3.2) and DiffusionDet (arXiv 2211.09788, section
3.4), but as a pre-norm residual stream, so that gradients reach a backbone that starts from scratch.
Shapes: B images, N proposals, C channels (C_s of a backbone stage), K classes, P grid cells a side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from dfm_kernels.dynamic_interaction import dynamic_interaction
from dfm_kernels.multilevel_roi_align import multilevel_roi_align
from torch import Tensor, nn

from dfm_d2.flow import at_least_float32
from dfm_d2.flow.time_embedding import TimeEmbedding

# Probability that every class starts with, so that thousands of background terms do not drown the rest
# (arXiv 1708.02002, section 4.1).
_PRIOR = 0.01


class HeadAnswer(NamedTuple):
    """class_logits: `(B, N, K)`. boxes: `(B, N, 4)` raw box answer. queries: `(B, N, C)`."""

    class_logits: Tensor
    boxes: Tensor
    queries: Tensor


def answer_layers(dim: int, num_classes: int) -> tuple[nn.Linear, nn.Linear]:
    """Layers of class logits and raw box answers, which begin with rare classes and unmoved boxes."""
    class_logits, box_answer = nn.Linear(dim, num_classes), nn.Linear(dim, 4)
    nn.init.constant_(class_logits.bias, -math.log((1 - _PRIOR) / _PRIOR))
    nn.init.normal_(box_answer.weight, std=0.001)
    nn.init.zeros_(box_answer.bias)
    return class_logits, box_answer


class FeaturePooler(nn.Module):
    """RoIAlign on the level that fits a proposal's size. No parameters.

    Args:
        scales: 1 / stride of each level, from fine to coarse.
        output_size: P. sampling_ratio: samples a cell and side, 0 is adaptive.
        canonical_size: side in pixels of a box that belongs on the level of stride 16.
    """

    def __init__(
        self, scales: Sequence[float], output_size: int, sampling_ratio: int, canonical_size: float = 224.0
    ):
        super().__init__()
        self.scales = tuple(scales)
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.canonical_size = canonical_size

    def forward(self, features: Sequence[Tensor], boxes_xyxy: Tensor) -> Tensor:
        """L maps `(B, C, H_l, W_l)` and pixel boxes `(B, N, 4)` to `(B N, C, P, P)`."""
        options = (self.scales, self.output_size, self.sampling_ratio, self.canonical_size)
        return multilevel_roi_align(features, boxes_xyxy, *options)


class DynamicConv(nn.Module):
    """Interaction by two matrices that each query makes, then one linear layer over the whole grid."""

    def __init__(self, dim: int, dynamic_dim: int, num_cells: int):
        super().__init__()
        self.dim, self.dynamic_dim = dim, dynamic_dim
        self.make_weights = nn.Linear(dim, 2 * dim * dynamic_dim)
        self.norm_in = nn.LayerNorm(dynamic_dim)
        self.norm_out = nn.LayerNorm(dim)
        self.out = nn.Linear(dim * num_cells, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, roi: Tensor) -> Tensor:
        """Queries `(M, C)` and RoI features `(M, P^2, C)` to `(M, C)`."""
        weights = self.make_weights(queries)
        weight_in, weight_out = weights.split(self.dim * self.dynamic_dim, dim=-1)
        mixed = dynamic_interaction(
            roi.to(weights.dtype),
            weight_in.view(-1, self.dim, self.dynamic_dim),
            weight_out.view(-1, self.dynamic_dim, self.dim),
            (self.norm_in.weight, self.norm_in.bias),
            (self.norm_out.weight, self.norm_out.bias),
        )
        # The grid itself goes along: the dynamic weights of a young head mean nothing yet, and the backbone
        # would wait for them.
        return torch.relu(self.norm(self.out((roi + mixed).flatten(1))))


class GridLinear(nn.Module):
    """One linear layer over the whole grid, scaled and shifted by the query: no per-query matrices."""

    def __init__(self, dim: int, num_cells: int):
        super().__init__()
        self.out = nn.Linear(dim * num_cells, dim)
        self.norm = nn.LayerNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)

    def forward(self, queries: Tensor, roi: Tensor) -> Tensor:
        """Queries `(M, C)` and RoI features `(M, P^2, C)` to `(M, C)`."""
        scale, shift = self.modulation(queries).chunk(2, dim=-1)
        return torch.relu(self.norm(self.out(roi.flatten(1)))) * (1 + scale) + shift


def _tower(dim: int, num_layers: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        layers += [nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class FlowHead(nn.Module):
    """One predictor, a block of local update: it shares no parameter and no activation with another.

    Args:
        pooler: shared by reference; it has no parameters.
        num_classes: K. dim: C, also the channels of the features.
        num_heads: attention heads. feedforward_dim: hidden width of the feed-forward.
        interaction: "dynamic_conv" or "grid_linear". dynamic_dim: hidden channels of dynamic_conv.
        num_cls, num_reg: layers of the class and box towers.
    """

    def __init__(
        self,
        *,
        pooler: FeaturePooler,
        num_classes: int,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        interaction: str,
        dynamic_dim: int,
        num_cls: int,
        num_reg: int,
    ):
        super().__init__()
        self.pooler = pooler
        num_cells = pooler.output_size**2
        self.box_embedding = nn.Sequential(nn.Linear(4, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim))
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        if interaction == "dynamic_conv":
            self.interaction = DynamicConv(dim, dynamic_dim, num_cells)
        elif interaction == "grid_linear":
            self.interaction = GridLinear(dim, num_cells)
        else:
            raise ValueError(f"interaction must be 'dynamic_conv' or 'grid_linear', got {interaction!r}")
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward_dim), nn.ReLU(inplace=True), nn.Linear(feedforward_dim, dim)
        )
        self.norm_in, self.norm_attention = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_feedforward, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.time_embedding = TimeEmbedding(dim)
        self.time_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.cls_tower, self.reg_tower = _tower(dim, num_cls), _tower(dim, num_reg)
        self.class_logits, self.box_answer = answer_layers(dim, num_classes)
        nn.init.zeros_(self.time_modulation[1].weight)  # begin as a head that ignores the time
        nn.init.zeros_(self.time_modulation[1].bias)

    def forward(
        self,
        features: Sequence[Tensor] | None,
        boxes_xyxy: Tensor | None,
        x_t: Tensor,
        u: Tensor,
        queries: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> HeadAnswer:
        """Answer for every proposal.

        Args:
            features: L maps `(B, C, H_l, W_l)`. boxes_xyxy: `(B, N, 4)` pixels, where to look.
            x_t: `(B, N, 4)` signal. u: `()` or `(B,)`, the warped time (the cascade's heads have t).
            queries: `(B, N, C)` of an earlier head; None: made here.
            pooled: `(B N, C, P, P)` features of the proposals, where they are there already; the first two
                arguments are then not used.
        """
        if pooled is None:
            pooled = self.pooler(features, boxes_xyxy)
        num_images, num_proposals = x_t.shape[:2]
        roi = pooled.flatten(2).transpose(1, 2)
        if queries is None:
            queries = self.own_queries(pooled).view(num_images, num_proposals, -1)
        stream = self.norm_in(queries) + self.box_embedding(x_t.to(queries.dtype))
        keys = self.norm_attention(stream)
        stream = stream + self.attention(keys, keys, keys, need_weights=False)[0]
        stream = stream + self.interaction(stream.flatten(0, 1), roi).view_as(stream)
        time = self.time_modulation(self.time_embedding(u.reshape(-1).expand(num_images)))
        scale, shift = time[:, None].chunk(2, dim=-1)
        stream = stream + self.feedforward(self.norm_feedforward(stream) * (1 + scale) + shift)
        answer = self.norm_out(stream)
        boxes = self.box_answer(self.reg_tower(answer))
        return HeadAnswer(self.class_logits(self.cls_tower(answer)), boxes, queries=stream)

    @staticmethod
    def own_queries(pooled: Tensor) -> Tensor:
        """Queries `(M, C)` where no earlier head gives any, from `(M, C, P, P)`."""
        return pooled.flatten(2).mean(2)


class StagePredictor(nn.Module):
    """A predictor that sees the output of one backbone stage, projected. Training needs it only.

    Args:
        in_channels: C_s. dim: C. head: its pooler has the one level of the stage.
    """

    def __init__(self, in_channels: int, dim: int, head: FlowHead):
        super().__init__()
        self.lateral = nn.Conv2d(in_channels, dim, 1)
        self.head = head

    def forward(self, feature: Tensor, boxes_xyxy: Tensor, x_t: Tensor, u: Tensor) -> HeadAnswer:
        """Answer at u `(B,)` for proposals `(B, N, 4)` in pixels and in signal, from `(B, C_s, H, W)`."""
        return self.head([at_least_float32(self.lateral(feature))], boxes_xyxy, x_t, u)
