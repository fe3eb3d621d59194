"""BackpropClassifier: the same split backbone, trained end to end with a linear head. The baseline.

Shapes: B images, C channels of the pooled features, K classes.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dfm_d2.classification.backbone import block_outputs, build_split_backbone
from dfm_d2.classification.base import Classifier, PreparedImages, classifier_arguments
from dfm_d2.flow import at_least_float32
from dfm_d2.framework import META_ARCH_REGISTRY, configurable
from dfm_d2.local_update import SHARED_BLOCK, BlockLosses, HandOver


@META_ARCH_REGISTRY.register()
class BackpropClassifier(Classifier):
    """Cross-entropy of a linear layer on the pooled output of the last block, one backward through all."""

    is_local = False

    @configurable
    def __init__(self, **common):
        super().__init__(temperature=1.0, **common)
        self.head = nn.Linear(self.backbone.channels[-1], self.num_classes)

    @classmethod
    def from_config(cls, cfg) -> dict:
        return classifier_arguments(cfg, build_split_backbone(cfg))

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """One block, "shared": gradients pass through everything."""
        return {SHARED_BLOCK: [(name, p) for name, p in self.named_parameters() if p.requires_grad]}

    def block_losses(self, prepared: PreparedImages, hand_over: HandOver) -> Iterator[BlockLosses]:
        """One item, of everything."""
        x = prepared.images
        for index in range(self.num_blocks):
            x = self.backbone.forward_block(index, x)
        logits = at_least_float32(self.head(self.backbone.pooled(x)))
        right = (logits.detach().argmax(-1) == prepared.labels).to(logits.dtype).mean()
        losses = {"loss_readout/head": cross_entropy(logits, prepared.labels), "right/head": right}
        yield BlockLosses((SHARED_BLOCK,), losses)

    def class_logits(self, images: Tensor, image_ids: Sequence[int | str]) -> Tensor:
        return self.head(block_outputs(self.backbone, images)[-1])[:, None]
