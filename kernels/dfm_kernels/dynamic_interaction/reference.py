"""Box-feature interaction by a convolution whose weights each query makes (Sparse R-CNN, arXiv 2011.12450).

Shapes: M queries, P^2 positions of the RoI grid, C channels, H dynamic channels, D sets of norms.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def _norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm of `(M, P^2, C)`; with gain and bias `(D, C)`, query m takes set `m // (M / D)`."""
    if gain.dim() == 1:
        return layer_norm(x, x.shape[-1:], gain, bias)
    gain, bias = (v.repeat_interleave(len(x) // len(gain), dim=0)[:, None] for v in (gain, bias))
    return layer_norm(x, x.shape[-1:]) * gain + bias


def dynamic_interaction(
    roi: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    norm_in: tuple[Tensor, Tensor],
    norm_out: tuple[Tensor, Tensor],
) -> Tensor:
    """`relu(LN(relu(LN(roi W_in)) W_out))`, the specification; the op says what the arguments are."""
    hidden = torch.relu(_norm(torch.bmm(roi, weight_in), *norm_in))
    return torch.relu(_norm(torch.bmm(hidden, weight_out), *norm_out))
