r"""How the features of the shared block reach the other blocks, and their gradients come back.

Notation: L_d is the weighted loss of block d, F the features, theta_s the shared block.
With F' = detach(F), a leaf, the backward of each block adds dL_d/dF' to the gradient of the leaf, and

    dL/dtheta_s = (sum_d dL_d/dF')^T dF/dtheta_s        one backward through the shared block,

which is the gradient of the joint loss L = sum_d L_d, to rounding: L_d depends on theta_s only through F.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from dfm_d2.local_update.blocks import SHARED_BLOCK, BlockLosses

Answer = TypeVar("Answer", bound=tuple[Tensor, ...])  # a NamedTuple
# The losses of the shared block itself, of its attached features.
OwnLosses = Callable[[Sequence[Tensor]], dict[str, Tensor]]


class HandOver:
    """Features stay attached: one backward of the sum of all losses crosses them.

    Args:
        together: blocks that may be evaluated together should come as one item.
    """

    def __init__(self, together: bool = False):
        self.together = together
        self._features: list[Tensor] = []

    def own(self, prepared: Any) -> Any:
        """The part of what was prepared that the shared block of this process sees."""
        return prepared

    def open(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What the other blocks see of the shared block's output; the caller keeps no other reference."""
        self._features = list(features)
        return self._features

    def close(self, own: OwnLosses | None = None) -> Iterator[BlockLosses]:
        """The last item, where the shared block has losses or a backward of its own."""
        if own is not None:
            yield BlockLosses((SHARED_BLOCK,), own(self._features))

    def owns(self, block: str) -> bool:
        """Whether this process evaluates a block."""
        return True

    def among_owners(self, block: str) -> AbstractContextManager:
        """Around the losses of a block, which only its owners evaluate together."""
        return nullcontext()

    def tell(self, index: int, answer: Answer | None, like: Answer) -> Answer:
        """What predictor ``index`` answers, detached, for all who need it.

        Args:
            answer: None in a process that does not own the predictor. like: tensors of its shapes and types.
        """
        return answer


class Leaves(HandOver):
    """Features are detached leaves, in whose gradients those of all blocks add up."""

    def __init__(self) -> None:
        super().__init__()
        self._leaves: list[Tensor] = []

    def open(self, features: Sequence[Tensor]) -> list[Tensor]:
        self._features = list(features)
        # Features of a frozen block have no gradient to wait for.
        self._leaves = [x.requires_grad_(f.requires_grad) for x, f in zip(self.detached(features), features)]
        return self._leaves

    def detached(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The values that the leaves begin with."""
        return [feature.detach() for feature in features]

    def gradients(self, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient of this process's own features."""
        return [leaf.grad for leaf in leaves]

    def close(self, own: OwnLosses | None = None) -> Iterator[BlockLosses]:
        """The shared block's item: one backward of its losses and of the gradients that met in the features.

        Nothing here keeps features or gradients: they are freed as that backward goes on, as in a joint one.
        """
        gradients = self.gradients(self._leaves)
        losses = {} if own is None else own(self._features)
        pairs = [(f, g) for f, g in zip(self._features, gradients) if f.requires_grad and g is not None]
        self._features.clear()
        self._leaves.clear()  # the list that the model has, too
        del gradients
        if pairs:
            root = _HandBack.apply([gradient for _, gradient in pairs], *[feature for feature, _ in pairs])
            del pairs
            yield BlockLosses((SHARED_BLOCK,), losses, root)


class _HandBack(torch.autograd.Function):
    """A scalar whose backward gives the features their gradients and keeps none of them.

    ``torch.autograd.backward(features, gradients)`` would hold all of both until its end.
    """

    @staticmethod
    def forward(ctx, gradients: list[Tensor], *features: Tensor) -> Tensor:
        ctx.gradients = gradients
        return features[0].new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple:
        gradients, ctx.gradients = ctx.gradients, []
        return None, *gradients
