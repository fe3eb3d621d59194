"""Blocks, the units of local update, and what a model offers so that it can be trained block by block."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dfm_d2.local_update.hand_over import HandOver

NamedParameters = list[tuple[str, nn.Parameter]]

# The block whose output the others share: it is stepped last.
SHARED_BLOCK = "shared"


class BlockLosses(NamedTuple):
    """One item of training: what the blocks of these names lose.

    losses: weighted scalars whose keys start with "loss"; entries with other keys are metrics.
    carried: a scalar whose backward hands on the gradients that other blocks left (HandOver.close).
    """

    blocks: tuple[str, ...]
    losses: dict[str, Tensor]
    carried: Tensor | None = None


@runtime_checkable
class LocallyTrainable(Protocol):
    """What a model, an ``nn.Module``, offers so that it can be trained block by block."""

    def blocks(self) -> dict[str, NamedParameters]:
        """{block: [(full name, parameter)]}: each trainable parameter exactly once."""
        ...

    def prepare(self, batched_inputs: list[dict], iteration: int) -> Any:
        """All that a step needs and that has no gradient; nothing changes it afterwards."""
        ...

    def block_losses(self, prepared: Any, hand_over: "HandOver") -> Iterator[BlockLosses]:
        """The losses of block after block.

        The consumer finishes the backward of an item before it asks for the next, so that the model may
        compute block by block, each on detached input. Features that several blocks share go through
        ``hand_over.open``; ``yield from hand_over.close()`` then ends the items, with what the shared block
        loses by itself as its argument.
        """
        ...


def predictor_block(index: int) -> str:
    """The name of the block of predictor ``index``: predictor0, predictor1, ..."""
    return f"predictor{index}"


def predictor_index(block: str) -> int | None:
    """The predictor of a block; None for other blocks."""
    match = re.fullmatch(r"predictor(\d+)", block)
    return int(match[1]) if match else None


def check_blocks(
    blocks: Mapping[str, NamedParameters], trainable: Iterable[tuple[str, nn.Parameter]] = ()
) -> None:
    """ValueError unless each parameter is in exactly one block, and each of ``trainable`` in one."""
    owner: dict[nn.Parameter, str] = {}
    for block, named in blocks.items():
        for name, parameter in named:
            if parameter in owner:
                raise ValueError(f"The parameter {name} is in the blocks {owner[parameter]} and {block}.")
            owner[parameter] = block
    if not owner:
        raise ValueError("No block has a parameter to train.")
    for name, parameter in trainable:
        if parameter not in owner:
            raise ValueError(f"The trainable parameter {name} is in no block.")


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """Sum of the entries whose key starts with "loss", in float32 or more; ValueError when there is none."""
    terms = [value for key, value in losses.items() if key.startswith("loss")]
    if not terms:
        raise ValueError(f"No entry of {sorted(losses)} starts with 'loss'.")
    return torch.stack([term.float() if term.dtype.itemsize < 4 else term for term in terms]).sum()
