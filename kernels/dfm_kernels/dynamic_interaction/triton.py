"""Triton kernels of the dynamic interaction: both products and both LayerNorms of a query on the chip.

The specification is the reference; the letters are the same. A program owns one query and leaves mean and
1/std of both LayerNorms (4 numbers a cell) to the backward. That makes again what the forward had on the
chip, in two launches, one for each product: in a single one the registers would not do.
Shapes: M queries, P^2 cells, C channels, H dynamic channels, D sets of norms (query m takes set m D // M).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FORWARD = {"num_warps": 8}
_BACKWARD = {"num_warps": 8, "num_stages": 1}
_EPS = tl.constexpr(1e-5)  # torch.nn.functional.layer_norm's


@triton.jit
def _tile(ptr, row, column, num_rows, num_columns):
    """`ptr[row, column]` of a row-major matrix, zero outside."""
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    return tl.load(ptr + row[:, None] * num_columns + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store_tile(ptr, value, row, column, num_rows, num_columns):
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    where = ptr + row[:, None] * num_columns + column[None, :]
    tl.store(where, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _vector(ptr, index, count):
    return tl.load(ptr + index, mask=index < count, other=0.0).to(tl.float32)


@triton.jit
def _dot(a, b):
    """In float32; float32 inputs are multiplied as TF32, others as they are."""
    return tl.dot(a, b, input_precision="tf32")


@triton.jit
def _of_query(inputs, m, sizes):
    """Of query m: its grid, its matrices, and weight and bias of its norms."""
    roi_ptr, weight_in_ptr, weight_out_ptr, gain_in_ptr, bias_in_ptr, gain_out_ptr, bias_out_ptr = inputs
    num_queries_of_a_set, num_cells, num_channels, num_hidden = sizes
    matrix = m * num_channels * num_hidden
    inner, outer = m // num_queries_of_a_set * num_hidden, m // num_queries_of_a_set * num_channels
    matrices = (roi_ptr + m * num_cells * num_channels, weight_in_ptr + matrix, weight_out_ptr + matrix)
    return matrices, (gain_in_ptr + inner, bias_in_ptr + inner), (gain_out_ptr + outer, bias_out_ptr + outer)


@triton.jit
def _product_in(matrices, p, h, sizes, CHUNK: tl.constexpr):
    """`roi W_in` `(P^2, H)` of one query."""
    _, num_cells, num_channels, num_hidden = sizes
    product = tl.zeros([p.shape[0], h.shape[0]], tl.float32)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        roi = _tile(matrices[0], p, c, num_cells, num_channels)
        product += _dot(roi, _tile(matrices[1], c, h, num_channels, num_hidden))
    return product


@triton.jit
def _activated(product, norm, index, count):
    """ReLU of the LayerNorm of every row, and the rows' mean and 1/std."""
    # What lies beyond H or C is zero in every matrix and vector, so sums over a row need no mask but here.
    mean = tl.sum(product, axis=1) / count
    centred = tl.where((index < count)[None, :], product - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / count + _EPS)
    gain, bias = _vector(norm[0], index, count), _vector(norm[1], index, count)
    return tl.maximum(centred * rstd[:, None] * gain[None, :] + bias[None, :], 0.0), mean, rstd


@triton.jit
def _dynamic_interaction_fwd_kernel(
    inputs,
    mixed_ptr,
    statistics_ptr,
    sizes,
    STATISTICS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    p, h, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    _, num_cells, num_channels, num_hidden = sizes
    matrices, norm_in, norm_out = _of_query(inputs, m, sizes)
    product = _product_in(matrices, p, h, sizes, CHUNK)
    hidden, mean_in, rstd_in = _activated(product, norm_in, h, num_hidden)
    weight_out = _tile(matrices[2], h, c, num_hidden, num_channels)
    product_out = _dot(hidden.to(weight_out.dtype), weight_out)
    mixed, mean_out, rstd_out = _activated(product_out, norm_out, c, num_channels)
    _store_tile(mixed_ptr + m * num_cells * num_channels, mixed, p, c, num_cells, num_channels)
    if STATISTICS:
        where = statistics_ptr + (m * num_cells + p) * 4
        tl.store(where, mean_in, mask=p < num_cells)
        tl.store(where + 1, rstd_in, mask=p < num_cells)
        tl.store(where + 2, mean_out, mask=p < num_cells)
        tl.store(where + 3, rstd_out, mask=p < num_cells)


@triton.jit
def _mean_and_rstd(statistics_ptr, p, num_cells):
    mean = tl.load(statistics_ptr + 4 * p, mask=p < num_cells, other=0.0)
    return mean, tl.load(statistics_ptr + 4 * p + 1, mask=p < num_cells, other=0.0)


@triton.jit
def _first_half(matrices, norm, statistics_ptr, p, h, sizes, CHUNK: tl.constexpr):
    """Of the first half of one query: normalised product, activation, gain and 1/std."""
    _, num_cells, _, num_hidden = sizes
    mean, rstd = _mean_and_rstd(statistics_ptr, p, num_cells)
    product = _product_in(matrices, p, h, sizes, CHUNK)
    gain, bias = _vector(norm[0], h, num_hidden), _vector(norm[1], h, num_hidden)
    normed = tl.where((h < num_hidden)[None, :], (product - mean[:, None]) * rstd[:, None], 0.0)
    return normed, tl.maximum(normed * gain[None, :] + bias[None, :], 0.0), gain, rstd


@triton.jit
def _outer_tile(hidden, weight_ptr, norm, d_mixed_ptr, mean, rstd, p, h, c, sizes):
    """Of a chunk of channels: W_out, its LayerNorm's output and gain, and the gradient behind the ReLU."""
    _, num_cells, num_channels, num_hidden = sizes
    weight = _tile(weight_ptr, h, c, num_hidden, num_channels)
    normed = (_dot(hidden, weight) - mean[:, None]) * rstd[:, None]
    gain, bias = _vector(norm[0], c, num_channels), _vector(norm[1], c, num_channels)
    d_mixed = _tile(d_mixed_ptr, p, c, num_cells, num_channels).to(tl.float32)
    return weight, normed, gain, tl.where(normed * gain[None, :] + bias[None, :] > 0, d_mixed, 0.0)


@triton.jit
def _dynamic_interaction_bwd_out_kernel(
    inputs,
    d_mixed_ptr,
    statistics_ptr,
    d_hidden_ptr,
    outputs,
    sizes,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    p, h = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_H)
    d_weight_ptr, d_gain_ptr, d_bias_ptr = outputs
    _, num_cells, num_channels, num_hidden = sizes
    matrices, norm_in, norm_out = _of_query(inputs, m, sizes)
    d_mixed_ptr += m * num_cells * num_channels
    statistics_ptr += m * num_cells * 4
    _, hidden, _, _ = _first_half(matrices, norm_in, statistics_ptr, p, h, sizes, CHUNK)
    hidden = hidden.to(matrices[0].dtype.element_ty)
    mean, rstd = _mean_and_rstd(statistics_ptr + 2, p, num_cells)

    # LayerNorm's gradient needs two means over a whole row before any element: one pass for them ...
    mean_1, mean_2 = tl.zeros([BLOCK_P], tl.float32), tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        weight, normed, gain, d = _outer_tile(
            hidden, matrices[2], norm_out, d_mixed_ptr, mean, rstd, p, h, c, sizes
        )
        tl.store(d_bias_ptr + m * num_channels + c, tl.sum(d, axis=0), mask=c < num_channels)
        tl.store(d_gain_ptr + m * num_channels + c, tl.sum(d * normed, axis=0), mask=c < num_channels)
        mean_1 += tl.sum(d * gain[None, :], axis=1) / num_channels
        mean_2 += tl.sum(d * gain[None, :] * normed, axis=1) / num_channels

    # ... and one for the products.
    d_hidden = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        weight, normed, gain, d = _outer_tile(
            hidden, matrices[2], norm_out, d_mixed_ptr, mean, rstd, p, h, c, sizes
        )
        d = rstd[:, None] * (d * gain[None, :] - mean_1[:, None] - normed * mean_2[:, None])
        d = tl.where((c < num_channels)[None, :], d, 0.0).to(weight.dtype)
        d_weight = _dot(tl.trans(hidden), d)
        _store_tile(d_weight_ptr + m * num_channels * num_hidden, d_weight, h, c, num_hidden, num_channels)
        d_hidden += _dot(d, tl.trans(weight))
    _store_tile(d_hidden_ptr + m * num_cells * num_hidden, d_hidden, p, h, num_cells, num_hidden)


@triton.jit
def _dynamic_interaction_bwd_in_kernel(
    inputs,
    statistics_ptr,
    d_hidden_ptr,
    outputs,
    sizes,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    p, h = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_H)
    d_roi_ptr, d_weight_ptr, d_gain_ptr, d_bias_ptr = outputs
    _, num_cells, num_channels, num_hidden = sizes
    matrices, norm, _ = _of_query(inputs, m, sizes)
    statistics_ptr += m * num_cells * 4
    normed, hidden, gain, rstd = _first_half(matrices, norm, statistics_ptr, p, h, sizes, CHUNK)
    d = _tile(d_hidden_ptr + m * num_cells * num_hidden, p, h, num_cells, num_hidden)
    d = tl.where(hidden > 0, d, 0.0)
    tl.store(d_bias_ptr + m * num_hidden + h, tl.sum(d, axis=0), mask=h < num_hidden)
    tl.store(d_gain_ptr + m * num_hidden + h, tl.sum(d * normed, axis=0), mask=h < num_hidden)
    d = d * gain[None, :]
    mean_1 = tl.sum(d, axis=1) / num_hidden
    mean_2 = tl.sum(d * normed, axis=1) / num_hidden
    d = rstd[:, None] * (d - mean_1[:, None] - normed * mean_2[:, None])
    d = tl.where((h < num_hidden)[None, :], d, 0.0).to(matrices[0].dtype.element_ty)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        roi = _tile(matrices[0], p, c, num_cells, num_channels)
        weight = _tile(matrices[1], c, h, num_channels, num_hidden)
        d_weight = _dot(tl.trans(roi), d)
        _store_tile(d_weight_ptr + m * num_channels * num_hidden, d_weight, c, h, num_channels, num_hidden)
        d_roi = _dot(d, tl.trans(weight))
        _store_tile(d_roi_ptr + m * num_cells * num_channels, d_roi, p, c, num_cells, num_channels)


def _block(count: int) -> int:
    """Side of a tile; a dot needs at least 16."""
    return max(triton.next_power_of_2(count), 16)


def _sizes_and_blocks(tensors: list[Tensor], chunk: int) -> tuple[tuple, dict]:
    """Both as the kernels take them, of one that works on `chunk` channels at a time."""
    num_queries, num_cells, num_channels = tensors[0].shape
    num_hidden = tensors[1].shape[2]
    blocks = {"BLOCK_P": _block(num_cells), "BLOCK_H": _block(num_hidden)}
    sizes = (num_queries // len(tensors[3]), num_cells, num_channels, num_hidden)
    return sizes, blocks | {"CHUNK": min(_block(num_channels), chunk)}


@torch.library.custom_op("dfm::dynamic_interaction", mutates_args=())
def dynamic_interaction(tensors: list[Tensor], statistics: bool) -> tuple[Tensor, Tensor]:
    """`(M, P^2, C)` in roi's dtype, and the LayerNorms' statistics `(M, P^2, 4)` float32, where asked for.

    tensors: roi `(M, P^2, C)`, weight_in `(M, C, H)`, weight_out `(M, H, C)`, all of one dtype;
    gain_in, bias_in `(D, H)`, gain_out, bias_out `(D, C)`; D divides M.
    """
    mixed, found = _empty_outputs(tensors, statistics)
    if mixed.numel():
        sizes, blocks = _sizes_and_blocks(tensors, 64)
        blocks |= {"BLOCK_C": _block(mixed.shape[2]), "STATISTICS": statistics}
        _dynamic_interaction_fwd_kernel[(len(mixed),)](
            tuple(x.contiguous() for x in tensors), mixed, found, sizes, **blocks, **_FORWARD
        )
    return mixed, found


def _empty_outputs(tensors: list[Tensor], statistics: bool) -> tuple[Tensor, Tensor]:
    roi = tensors[0]
    shape = (*roi.shape[:2], 4) if statistics else (0,)
    return roi.new_empty(roi.shape), roi.new_empty(shape, dtype=torch.float32)


dynamic_interaction.register_fake(_empty_outputs)


@dynamic_interaction.register_vmap
def _(info, in_dims, tensors, statistics):
    """A batch of predictors is more queries with more sets of norms."""
    folded = []
    for tensor, dim in zip(tensors, in_dims[0]):
        batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        folded.append(batched.flatten(0, 1))
    # Within vmap a tensor does not tell that it requires a gradient.
    statistics = statistics or (torch.is_grad_enabled() and any(x.requires_grad for x in folded))
    mixed, found = dynamic_interaction(folded, statistics)
    mixed = mixed.unflatten(0, (info.batch_size, -1))
    if not statistics:
        return (mixed, found), (0, None)
    return (mixed, found.unflatten(0, (info.batch_size, -1))), (0, 0)


@torch.library.custom_op("dfm::dynamic_interaction_backward", mutates_args=())
def _backward(tensors: list[Tensor], d_mixed: Tensor, statistics: Tensor) -> list[Tensor]:
    """Gradients by the seven tensors: the first three in their dtype, those of the norms in float32."""
    inputs = tuple(x.contiguous() for x in tensors)
    roi, d_mixed = inputs[0], d_mixed.contiguous()
    found = [x.new_empty(x.shape) for x in inputs[:3]]
    # A row a query, added up below in a fixed order.
    rows = [x.new_empty(len(roi), x.shape[1], dtype=torch.float32) for x in inputs[3:]]
    if roi.numel():
        # The largest chunks that do not spill on sm_80, sm_90 and gfx942.
        sizes, outer = _sizes_and_blocks(tensors, 16 if roi.dtype == torch.float32 else 32)
        _, inner = _sizes_and_blocks(tensors, 64)
        d_hidden = roi.new_empty(*roi.shape[:2], sizes[3], dtype=torch.float32)
        _dynamic_interaction_bwd_out_kernel[(len(roi),)](
            inputs, d_mixed, statistics, d_hidden, (found[2], *rows[2:]), sizes, **outer, **_BACKWARD
        )
        _dynamic_interaction_bwd_in_kernel[(len(roi),)](
            inputs, statistics, d_hidden, (*found[:2], *rows[:2]), sizes, **inner, **_BACKWARD
        )
    return [*found, *(row.view(len(x), -1, row.shape[1]).sum(1) for row, x in zip(rows, inputs[3:]))]


@_backward.register_fake
def _(tensors, *others):
    like = [x.new_empty(x.shape) for x in tensors[:3]]
    return [*like, *(x.new_empty(x.shape, dtype=torch.float32) for x in tensors[3:])]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, d_mixed, _):
    *inputs, statistics = ctx.saved_tensors
    if statistics.numel() == 0 and d_mixed.numel() > 0:
        raise RuntimeError("dfm::dynamic_interaction was called without statistics, which its backward needs")
    found = _backward(inputs, d_mixed, statistics)
    return [gradient.to(x.dtype) for gradient, x in zip(found, inputs)], None


dynamic_interaction.register_autograd(_gradients, setup_context=_setup_context)
