"""StochasticForwardForwardClassifier: goodness by dimensionality compression (Zhu et al., arXiv 2505.16649).

A block minimises the effective dimension of its answers to noisy copies of an image and maximises that over
the images, without labels and without negative images; a linear layer reads the class out of the mean of its
squared answers. The objective and the read-out are the paper's; the noise's place and scale are ours.
Shapes: B images, R noisy copies, C channels of the pooled output, K classes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dfm_d2.classification.backbone import build_split_backbone
from dfm_d2.classification.base import Classifier, PreparedImages, block_name, classifier_arguments
from dfm_d2.classification.forward_forward import unit_square
from dfm_d2.classification.sampler import normals
from dfm_d2.flow import at_least_float32, stream_key
from dfm_d2.flow.noise import STREAM_COPIES
from dfm_d2.framework import META_ARCH_REGISTRY, configurable
from dfm_d2.local_update import BlockLosses, HandOver


@META_ARCH_REGISTRY.register()
class StochasticForwardForwardClassifier(Classifier):
    """Args (besides those of Classifier):
    copies: R. noise: standard deviation on a block's input, whose mean square is 1. copy_weight: of the
    copies' dimension against the images'. seed_inference: of the noise at inference.
    """

    @configurable
    def __init__(self, *, copies: int, noise: float, copy_weight: float, seed_inference: int, **common):
        super().__init__(temperature=1.0, **common)
        self.copies, self.noise, self.copy_weight = copies, noise, copy_weight
        self.seed_inference = seed_inference
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, self.num_classes))
            for channels in self.backbone.channels
        )

    @classmethod
    def from_config(cls, cfg) -> dict:
        c = cfg.MODEL.CLASSIFIER
        return classifier_arguments(cfg, build_split_backbone(cfg)) | {
            "copies": c.FF.COPIES,
            "noise": c.FF.NOISE,
            "copy_weight": c.FF.COPY_WEIGHT,
            "seed_inference": c.SAMPLER.SEED,
        }

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters of each block, its read-out among them."""
        blocks = self.backbone_blocks()
        for name, parameter in self.heads.named_parameters():
            blocks[block_name(int(name.split(".")[0]))].append((f"heads.{name}", parameter))
        return blocks

    def block_losses(self, prepared: PreparedImages, hand_over: HandOver) -> Iterator[BlockLosses]:
        """Block after block, each on the detached output of the one before."""
        for index, answers in enumerate(self._answers(prepared.images, prepared.keys)):
            yield BlockLosses((block_name(index),), self._losses(index, answers, prepared.labels))

    def _losses(self, index: int, answers: Tensor, labels: Tensor) -> dict[str, Tensor]:
        name, energy = block_name(index), answers.detach().square().mean(1)
        of_copies = effective_dimension(answers).log().mean()
        of_images = effective_dimension(answers.mean(1)).log()
        logits = self.heads[index](energy)
        return {
            f"loss_dimension/{name}": self.copy_weight * of_copies - of_images,
            f"loss_readout/{name}": cross_entropy(logits, labels),
            f"right/{name}": (logits.detach().argmax(-1) == labels).to(logits.dtype).mean(),
        }

    def _answers(self, x: Tensor, keys: Sequence[int]):
        """The answers `(B, R, C)` of block after block to noisy copies of its input."""
        for index in range(self.num_blocks):
            # Copies of the mean answer: they would multiply from block to block.
            noise = normals(keys, (self.copies, *x.shape[1:]), x, STREAM_COPIES + index)
            copies = unit_square(x)[:, None] + self.noise * noise
            outputs = self.backbone.forward_block(index, copies.flatten(0, 1))
            pooled = at_least_float32(self.backbone.pooled(outputs))
            yield pooled.unflatten(0, (-1, self.copies))
            x = outputs.detach().unflatten(0, (-1, self.copies)).mean(1)

    @torch.no_grad()
    def class_logits(self, images: Tensor, image_ids: Sequence[int | str]) -> Tensor:
        """Logits `(B, D, K)` of the read-outs of all D blocks."""
        keys = [stream_key("classify", self.seed_inference, image_id) for image_id in image_ids]
        answers = enumerate(self._answers(images, keys))
        return torch.stack([self.heads[d](found.square().mean(1)) for d, found in answers], 1)


def effective_dimension(x: Tensor) -> Tensor:
    """`tr(S)^2 / tr(S^2)` of the covariance S of points `(..., n, C)`: from 1 to min(n - 1, C).

    Of any scale; points that are all one, which have no direction, count as 1 and give no gradient.
    """
    centred = x - x.mean(-2, keepdim=True)
    gram = centred @ centred.transpose(-1, -2)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    spread = trace > torch.finfo(x.dtype).tiny
    share = gram / torch.where(spread, trace, 1.0)[..., None, None]
    return torch.where(spread, 1 / torch.where(spread, share.square().sum((-1, -2)), 1.0), 1.0)
