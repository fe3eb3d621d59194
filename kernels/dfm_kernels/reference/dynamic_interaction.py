"""Box-feature interaction by a convolution whose weights each query makes (Sparse R-CNN, arXiv 2011.12450).

Shapes: M queries, P^2 positions of the RoI grid, C channels, H dynamic channels.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def dynamic_interaction(
    roi: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    norm_in: tuple[Tensor, Tensor],
    norm_out: tuple[Tensor, Tensor],
) -> Tensor:
    """`relu(LN(relu(LN(roi W_in)) W_out))`, one pair of matrices a query.

    Args:
        roi: `(M, P^2, C)`. weight_in: `(M, C, H)`. weight_out: `(M, H, C)`.
        norm_in, norm_out: weight and bias of the LayerNorms, `(H,)` and `(C,)`.

    Returns:
        `(M, P^2, C)`.
    """
    hidden = torch.relu(layer_norm(torch.bmm(roi, weight_in), weight_in.shape[-1:], *norm_in))
    return torch.relu(layer_norm(torch.bmm(hidden, weight_out), weight_out.shape[-1:], *norm_out))
