"""The ops `dfm::dynamic_interaction` and `dfm::dynamic_interaction_backward`.

Shapes: M queries, P^2 positions of the RoI grid, C channels, H dynamic channels, D sets of norms.
"""

import torch
from torch import Tensor

from dfm_kernels import reference
from dfm_kernels.dispatch import is_interpreted, use_triton

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


def dynamic_interaction(
    roi: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    norm_in: tuple[Tensor, Tensor],
    norm_out: tuple[Tensor, Tensor],
    *,
    backend: str = "auto",
) -> Tensor:
    """`relu(LN(relu(LN(roi W_in)) W_out))`, one pair of matrices a query; see the reference.

    Args:
        roi: `(M, P^2, C)`. weight_in: `(M, C, H)`. weight_out: `(M, H, C)`.
        norm_in, norm_out: weight and bias of the LayerNorms, `(H,)` and `(C,)`; or, where M holds the queries
            of D predictors one after another, `(D, H)` and `(D, C)`.
        backend: one of dfm_kernels.dispatch.BACKENDS.

    Returns:
        `(M, P^2, C)`; where the Triton kernel ran, it cannot be differentiated twice.

    Raises:
        BackendError: "triton" was asked for where it cannot run.
        ValueError: shapes that do not belong together.
    """
    num_queries, _, channels = roi.shape
    hidden, sets = weight_in.shape[-1], norm_in[0].reshape(-1, norm_in[0].shape[-1]).shape[0]
    if weight_in.shape != (num_queries, channels, hidden) or weight_out.shape != (
        num_queries,
        hidden,
        channels,
    ):
        raise ValueError(
            f"roi {tuple(roi.shape)}, weight_in {tuple(weight_in.shape)} and weight_out "
            f"{tuple(weight_out.shape)} must be (M, P^2, C), (M, C, H) and (M, H, C)"
        )
    if num_queries % max(sets, 1) or any(x.shape[-1] != hidden for x in norm_in):
        raise ValueError(f"norms of {sets} predictors and H = {hidden} do not divide M = {num_queries}")
    if not use_triton("dynamic_interaction", backend, roi, _unsupported(roi, weight_in, weight_out)):
        return reference.dynamic_interaction(roi, weight_in, weight_out, norm_in, norm_out)
    norms = [x.reshape(sets, -1) for x in (*norm_in, *norm_out)]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (roi, weight_in, weight_out, *norms))
    return _dynamic_interaction(roi, weight_in, weight_out, *norms, wanted)[0]


@torch.library.custom_op("dfm::dynamic_interaction", mutates_args=())
def _dynamic_interaction(
    roi: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gain_in: Tensor,
    bias_in: Tensor,
    gain_out: Tensor,
    bias_out: Tensor,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    # Only here: where there is no Triton, the reference must do without this import.
    from dfm_kernels.triton.dynamic_interaction import dynamic_interaction as launch

    return launch(roi, weight_in, weight_out, gain_in, bias_in, gain_out, bias_out, statistics)


@_dynamic_interaction.register_fake
def _(roi, weight_in, weight_out, gain_in, bias_in, gain_out, bias_out, statistics):
    shape = (*roi.shape[:2], 4) if statistics else (0,)
    return roi.new_empty(roi.shape), roi.new_empty(shape, dtype=torch.float32)


@_dynamic_interaction.register_vmap
def _(info, in_dims, *arguments):
    """A batch of predictors is more queries with more sets of norms."""
    *tensors, statistics = arguments
    folded = []
    for tensor, dim in zip(tensors, in_dims):
        batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        folded.append(batched.flatten(0, 1))
    # Within vmap a tensor does not tell that it requires a gradient.
    statistics = statistics or (torch.is_grad_enabled() and any(x.requires_grad for x in folded))
    mixed, found = _dynamic_interaction(*folded, statistics)
    shape = (info.batch_size, -1)
    if not statistics:
        return (mixed.unflatten(0, shape), found), (0, None)
    return (mixed.unflatten(0, shape), found.unflatten(0, shape)), (0, 0)


@torch.library.custom_op("dfm::dynamic_interaction_backward", mutates_args=())
def _backward(
    roi: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gain_in: Tensor,
    bias_in: Tensor,
    gain_out: Tensor,
    bias_out: Tensor,
    d_mixed: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from dfm_kernels.triton.dynamic_interaction_backward import dynamic_interaction_backward as launch

    norms = (gain_in, bias_in, gain_out, bias_out)
    return tuple(launch(roi, weight_in, weight_out, *norms, d_mixed, statistics))


@_backward.register_fake
def _(roi, weight_in, weight_out, gain_in, bias_in, gain_out, bias_out, d_mixed, statistics):
    like = [x.new_empty(x.shape) for x in (roi, weight_in, weight_out)]
    norms = (gain_in, bias_in, gain_out, bias_out)
    return *like, *(x.new_empty(x.shape, dtype=torch.float32) for x in norms)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, d_mixed, _):
    *inputs, statistics = ctx.saved_tensors
    if statistics.numel() == 0 and d_mixed.numel() > 0:
        raise RuntimeError("dfm::dynamic_interaction was called without statistics, which its backward needs")
    found = _backward(*inputs, d_mixed, statistics)
    return *(gradient.to(x.dtype) for gradient, x in zip(found, inputs)), None


_dynamic_interaction.register_autograd(_gradients, setup_context=_setup_context)
