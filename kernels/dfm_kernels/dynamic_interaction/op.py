"""The choice between reference and kernel."""

from functools import wraps

import torch
from torch import Tensor

from dfm_kernels.dispatch import is_interpreted, use_triton
from dfm_kernels.dynamic_interaction import reference

# One program holds P^2 x C and P^2 x H of a query in registers: what is larger would spill.
_MAX_CELLS, _MAX_CHANNELS, _MAX_HIDDEN = 64, 256, 64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _unsupported(roi: Tensor, weight_in: Tensor, weight_out: Tensor) -> str:
    """Why the kernel cannot take these tensors; empty: it can."""
    if len({x.dtype for x in (roi, weight_in, weight_out)}) > 1 or roi.dtype not in _DTYPES:
        return (
            f"the grid and the matrices are {roi.dtype}, {weight_in.dtype} and {weight_out.dtype}; the "
            "kernel takes one of float32, float16 and bfloat16 for all"
        )
    if roi.shape[1] > _MAX_CELLS or roi.shape[2] > _MAX_CHANNELS or weight_in.shape[2] > _MAX_HIDDEN:
        return (
            f"P^2 = {roi.shape[1]}, C = {roi.shape[2]}, H = {weight_in.shape[2]} do not fit on the chip: it "
            f"holds {_MAX_CELLS}, {_MAX_CHANNELS} and {_MAX_HIDDEN}"
        )
    if roi.is_cuda and roi.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return (
            "float32 would be multiplied as TF32: allow that with "
            "torch.set_float32_matmul_precision('high'), or use bfloat16"
        )
    if is_interpreted() and roi.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return ""


# `__wrapped__` alone: help and editors show the reference's signature with the docstring here.
@wraps(reference.dynamic_interaction, assigned=())
def dynamic_interaction(roi, weight_in, weight_out, norm_in, norm_out) -> Tensor:
    """`relu(LN(relu(LN(roi W_in)) W_out))`, one pair of matrices a query.

    Shapes: M queries, P^2 positions of the RoI grid, C channels, H dynamic channels, D sets of norms.

    Args:
        roi: `(M, P^2, C)`. weight_in: `(M, C, H)`. weight_out: `(M, H, C)`.
        norm_in, norm_out: weight and bias of the LayerNorms, `(H,)` and `(C,)`; or, where M holds the queries
            of D predictors one after another, `(D, H)` and `(D, C)`.

    Returns:
        `(M, P^2, C)`; where the Triton kernel ran, it cannot be differentiated twice.

    Raises:
        BackendError: "triton" was asked for where it cannot run.
        ValueError: shapes that do not belong together.
    """
    num_queries, _, channels = roi.shape
    hidden, sets = weight_in.shape[-1], norm_in[0].reshape(-1, norm_in[0].shape[-1]).shape[0]
    matrices = (num_queries, channels, hidden), (num_queries, hidden, channels)
    if (weight_in.shape, weight_out.shape) != matrices:
        raise ValueError(
            f"roi {tuple(roi.shape)}, weight_in {tuple(weight_in.shape)} and weight_out "
            f"{tuple(weight_out.shape)} must be (M, P^2, C), (M, C, H) and (M, H, C)"
        )
    widths = [x.shape[-1] for x in (*norm_in, *norm_out)]
    if num_queries % max(sets, 1) or widths != [hidden, hidden, channels, channels]:
        raise ValueError(
            f"norms of {sets} predictors and the sizes {widths} do not fit M = {num_queries}, H = {hidden}, "
            f"C = {channels}"
        )
    if not use_triton("dynamic_interaction", roi, _unsupported(roi, weight_in, weight_out)):
        return reference.dynamic_interaction(roi, weight_in, weight_out, norm_in, norm_out)
    from dfm_kernels.dynamic_interaction.triton import dynamic_interaction as on_triton

    tensors = [roi, weight_in, weight_out, *(x.reshape(sets, -1) for x in (*norm_in, *norm_out))]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return on_triton(tensors, wanted)[0]
