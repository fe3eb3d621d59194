"""What ONNX has no operator for, in terms of operators that it has.

Shapes: M bags of S entries each, V rows of C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bags of RoIAlign (dfm_kernels/multilevel_roi_align/reference.py): all of one size, weighted sums.

    Entry by entry: one gather of all entries would hold S times the answer in memory, and the exporter's own
    translation loops over the bags.

    Args:
        weight: `(V, C)`. indices, per_sample_weights: `(M S,)`. offsets: `(M,)`.
    """
    if mode != 0 or per_sample_weights is None:
        raise NotImplementedError("only the weighted sums of RoIAlign are exported")
    bags = offsets.shape[0]
    rows, shares = indices.view(bags, -1), per_sample_weights.view(bags, -1)
    total = weight.index_select(0, rows[:, 0]) * shares[:, :1]
    for entry in range(1, rows.shape[1]):
        total = total + weight.index_select(0, rows[:, entry]) * shares[:, entry : entry + 1]
    unused = offsets.new_empty(0)
    return total, unused, unused, unused


def onnx_decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """The table for `ExportedProgram.run_decompositions` before the translation to ONNX."""
    table = torch.export.default_decompositions()
    aten = torch.ops.aten
    for op in (aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
        table[op] = _embedding_bag
    return table
