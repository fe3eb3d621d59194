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

FORWARD = {"num_warps": 8}
BACKWARD = {"num_warps": 8, "num_stages": 1}
_EPS = 1e-5  # torch.nn.functional.layer_norm's


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
def _product_in(roi_ptr, weight_in_ptr, p, h, num_cells, num_channels, num_hidden, CHUNK: tl.constexpr):
    """`roi W_in` `(P^2, H)` of one query."""
    product = tl.zeros([p.shape[0], h.shape[0]], tl.float32)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        roi = _tile(roi_ptr, p, c, num_cells, num_channels)
        product += _dot(roi, _tile(weight_in_ptr, c, h, num_channels, num_hidden))
    return product


@triton.jit
def _dynamic_interaction_fwd_kernel(
    roi_ptr,
    weight_in_ptr,
    weight_out_ptr,
    gain_in_ptr,
    bias_in_ptr,
    gain_out_ptr,
    bias_out_ptr,
    mixed_ptr,
    statistics_ptr,
    num_queries_of_a_set,
    num_cells,
    num_channels,
    num_hidden,
    eps,
    STATISTICS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    norms = m // num_queries_of_a_set
    p, h, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    roi_ptr += m * num_cells * num_channels
    weight_in_ptr += m * num_channels * num_hidden
    weight_out_ptr += m * num_channels * num_hidden

    # What lies beyond H or C is zero in every matrix and vector, so sums over a row need no mask but here.
    product = _product_in(roi_ptr, weight_in_ptr, p, h, num_cells, num_channels, num_hidden, CHUNK)
    mean_in = tl.sum(product, axis=1) / num_hidden
    centred = tl.where((h < num_hidden)[None, :], product - mean_in[:, None], 0.0)
    rstd_in = tl.rsqrt(tl.sum(centred * centred, axis=1) / num_hidden + eps)
    gain = _vector(gain_in_ptr + norms * num_hidden, h, num_hidden)
    bias = _vector(bias_in_ptr + norms * num_hidden, h, num_hidden)
    hidden = tl.maximum(centred * rstd_in[:, None] * gain[None, :] + bias[None, :], 0.0)

    weight_out = _tile(weight_out_ptr, h, c, num_hidden, num_channels)
    product_out = _dot(hidden.to(weight_out.dtype), weight_out)
    mean_out = tl.sum(product_out, axis=1) / num_channels
    centred_out = tl.where((c < num_channels)[None, :], product_out - mean_out[:, None], 0.0)
    rstd_out = tl.rsqrt(tl.sum(centred_out * centred_out, axis=1) / num_channels + eps)
    gain_out = _vector(gain_out_ptr + norms * num_channels, c, num_channels)
    bias_out = _vector(bias_out_ptr + norms * num_channels, c, num_channels)
    mixed = tl.maximum(centred_out * rstd_out[:, None] * gain_out[None, :] + bias_out[None, :], 0.0)
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
def _hidden(product, mean, rstd, gain, bias, h, num_hidden):
    """Normalised product and activation of the first half of one query."""
    normed = tl.where((h < num_hidden)[None, :], (product - mean[:, None]) * rstd[:, None], 0.0)
    return normed, tl.maximum(normed * gain[None, :] + bias[None, :], 0.0)


@triton.jit
def _outer_tile(
    hidden,
    weight_ptr,
    gain_ptr,
    bias_ptr,
    d_mixed_ptr,
    mean,
    rstd,
    p,
    h,
    c,
    num_cells,
    num_channels,
    num_hidden,
):
    """Of a chunk of channels: W_out, its LayerNorm's output and gain, and the gradient behind the ReLU."""
    weight = _tile(weight_ptr, h, c, num_hidden, num_channels)
    normed = (_dot(hidden, weight) - mean[:, None]) * rstd[:, None]
    gain, bias = _vector(gain_ptr, c, num_channels), _vector(bias_ptr, c, num_channels)
    d_mixed = _tile(d_mixed_ptr, p, c, num_cells, num_channels).to(tl.float32)
    return weight, normed, gain, tl.where(normed * gain[None, :] + bias[None, :] > 0, d_mixed, 0.0)


@triton.jit
def _dynamic_interaction_bwd_out_kernel(
    roi_ptr,
    weight_in_ptr,
    weight_out_ptr,
    gain_in_ptr,
    bias_in_ptr,
    gain_out_ptr,
    bias_out_ptr,
    d_mixed_ptr,
    statistics_ptr,
    d_hidden_ptr,
    d_weight_out_ptr,
    d_gain_out_ptr,
    d_bias_out_ptr,
    num_queries_of_a_set,
    num_cells,
    num_channels,
    num_hidden,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    norms = m // num_queries_of_a_set
    p, h = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_H)
    matrix = m * num_channels * num_hidden
    gain_out_ptr += norms * num_channels
    bias_out_ptr += norms * num_channels
    weight_out_ptr += matrix
    d_mixed_ptr += m * num_cells * num_channels
    statistics_ptr += m * num_cells * 4
    roi_ptr += m * num_cells * num_channels
    mean, rstd = _mean_and_rstd(statistics_ptr, p, num_cells)
    product = _product_in(roi_ptr, weight_in_ptr + matrix, p, h, num_cells, num_channels, num_hidden, CHUNK)
    gain_in = _vector(gain_in_ptr + norms * num_hidden, h, num_hidden)
    bias_in = _vector(bias_in_ptr + norms * num_hidden, h, num_hidden)
    _, hidden = _hidden(product, mean, rstd, gain_in, bias_in, h, num_hidden)
    hidden = hidden.to(roi_ptr.dtype.element_ty)
    mean, rstd = _mean_and_rstd(statistics_ptr + 2, p, num_cells)

    # LayerNorm's gradient needs two means over a whole row before any element: one pass for them ...
    mean_1, mean_2 = tl.zeros([BLOCK_P], tl.float32), tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        weight, normed, gain, d = _outer_tile(
            hidden,
            weight_out_ptr,
            gain_out_ptr,
            bias_out_ptr,
            d_mixed_ptr,
            mean,
            rstd,
            p,
            h,
            c,
            num_cells,
            num_channels,
            num_hidden,
        )
        tl.store(d_bias_out_ptr + m * num_channels + c, tl.sum(d, axis=0), mask=c < num_channels)
        tl.store(d_gain_out_ptr + m * num_channels + c, tl.sum(d * normed, axis=0), mask=c < num_channels)
        mean_1 += tl.sum(d * gain[None, :], axis=1) / num_channels
        mean_2 += tl.sum(d * gain[None, :] * normed, axis=1) / num_channels

    # ... and one for the products.
    d_hidden = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        weight, normed, gain, d = _outer_tile(
            hidden,
            weight_out_ptr,
            gain_out_ptr,
            bias_out_ptr,
            d_mixed_ptr,
            mean,
            rstd,
            p,
            h,
            c,
            num_cells,
            num_channels,
            num_hidden,
        )
        d = rstd[:, None] * (d * gain[None, :] - mean_1[:, None] - normed * mean_2[:, None])
        d = tl.where((c < num_channels)[None, :], d, 0.0).to(weight.dtype)
        d_weight = _dot(tl.trans(hidden), d)
        _store_tile(d_weight_out_ptr + matrix, d_weight, h, c, num_hidden, num_channels)
        d_hidden += _dot(d, tl.trans(weight))
    _store_tile(d_hidden_ptr + m * num_cells * num_hidden, d_hidden, p, h, num_cells, num_hidden)


@triton.jit
def _dynamic_interaction_bwd_in_kernel(
    roi_ptr,
    weight_in_ptr,
    gain_in_ptr,
    bias_in_ptr,
    statistics_ptr,
    d_hidden_ptr,
    d_roi_ptr,
    d_weight_in_ptr,
    d_gain_in_ptr,
    d_bias_in_ptr,
    num_queries_of_a_set,
    num_cells,
    num_channels,
    num_hidden,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    norms = m // num_queries_of_a_set
    p, h = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_H)
    grid, matrix = m * num_cells * num_channels, m * num_channels * num_hidden
    mean, rstd = _mean_and_rstd(statistics_ptr + m * num_cells * 4, p, num_cells)
    product = _product_in(
        roi_ptr + grid, weight_in_ptr + matrix, p, h, num_cells, num_channels, num_hidden, CHUNK
    )
    gain = _vector(gain_in_ptr + norms * num_hidden, h, num_hidden)
    bias = _vector(bias_in_ptr + norms * num_hidden, h, num_hidden)
    normed, hidden = _hidden(product, mean, rstd, gain, bias, h, num_hidden)
    d = _tile(d_hidden_ptr + m * num_cells * num_hidden, p, h, num_cells, num_hidden)
    d = tl.where(hidden > 0, d, 0.0)
    tl.store(d_bias_in_ptr + m * num_hidden + h, tl.sum(d, axis=0), mask=h < num_hidden)
    tl.store(d_gain_in_ptr + m * num_hidden + h, tl.sum(d * normed, axis=0), mask=h < num_hidden)
    d = d * gain[None, :]
    mean_1 = tl.sum(d, axis=1) / num_hidden
    mean_2 = tl.sum(d * normed, axis=1) / num_hidden
    d = rstd[:, None] * (d - mean_1[:, None] - normed * mean_2[:, None])
    d = tl.where((h < num_hidden)[None, :], d, 0.0).to(roi_ptr.dtype.element_ty)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        roi = _tile(roi_ptr + grid, p, c, num_cells, num_channels)
        weight = _tile(weight_in_ptr + matrix, c, h, num_channels, num_hidden)
        d_weight = _dot(tl.trans(roi), d)
        _store_tile(d_weight_in_ptr + matrix, d_weight, c, h, num_channels, num_hidden)
        d_roi = _dot(d, tl.trans(weight))
        _store_tile(d_roi_ptr + grid, d_roi, p, c, num_cells, num_channels)


def _block(count: int) -> int:
    """Side of a tile; a dot needs at least 16."""
    return max(triton.next_power_of_2(count), 16)


def constants(shape: tuple[int, int, int], chunk: int) -> dict:
    """Compile-time constants for `(P^2, C, H)` of a kernel that works on `chunk` channels at a time."""
    num_cells, num_channels, num_hidden = shape
    return {
        "BLOCK_P": _block(num_cells),
        "BLOCK_H": _block(num_hidden),
        "CHUNK": min(_block(num_channels), chunk),
    }


def forward_constants(shape: tuple[int, int, int], statistics: bool) -> dict:
    """Those of the forward."""
    return constants(shape, 64) | {"BLOCK_C": _block(shape[1]), "STATISTICS": statistics}


def backward_constants(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[dict, dict]:
    """Those of the launch for the outer half and of that for the inner one."""
    # The largest chunks that do not spill on sm_80, sm_90 and gfx942.
    return constants(shape, 16 if dtype == torch.float32 else 32), constants(shape, 64)


@torch.library.custom_op("dfm::dynamic_interaction", mutates_args=())
def dynamic_interaction(
    roi: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gain_in: Tensor,
    bias_in: Tensor,
    gain_out: Tensor,
    bias_out: Tensor,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """`(M, P^2, C)` in roi's dtype, and the LayerNorms' statistics `(M, P^2, 4)` float32, where asked for.

    Args:
        roi: `(M, P^2, C)`. weight_in: `(M, C, H)`. weight_out: `(M, H, C)`, all of one dtype.
        gain_in, bias_in: `(D, H)`. gain_out, bias_out: `(D, C)`; D divides M.
    """
    sizes = (*roi.shape[1:], weight_in.shape[-1])
    mixed, found = _empty_answers(roi, statistics)
    if mixed.numel():
        tensors = (roi, weight_in, weight_out, gain_in, bias_in, gain_out, bias_out)
        _dynamic_interaction_fwd_kernel[(len(roi),)](
            *(x.contiguous() for x in tensors),
            mixed,
            found,
            len(roi) // len(gain_in),
            *sizes,
            _EPS,
            **forward_constants(sizes, statistics),
            **FORWARD,
        )
    return mixed, found


def _empty_answers(roi: Tensor, statistics: bool) -> tuple[Tensor, Tensor]:
    shape = (*roi.shape[:2], 4) if statistics else (0,)
    return roi.new_empty(roi.shape), roi.new_empty(shape, dtype=torch.float32)


@dynamic_interaction.register_fake
def _(roi, *others):
    return _empty_answers(roi, others[-1])


@dynamic_interaction.register_vmap
def _(info, in_dims, *arguments):
    """A batch of predictors is more queries with more sets of norms."""
    *tensors, statistics = arguments
    folded = []
    for tensor, dim in zip(tensors, in_dims):
        batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        folded.append(batched.flatten(0, 1))
    # Within vmap a tensor does not tell that it requires a gradient.
    statistics = statistics or (torch.is_grad_enabled() and any(x.requires_grad for x in folded))
    mixed, found = dynamic_interaction(*folded, statistics)
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
    """Gradients by the seven arguments: the first three in their dtype, those of the norms in float32."""
    roi, weight_in, weight_out = (x.contiguous() for x in (roi, weight_in, weight_out))
    norms = [x.contiguous() for x in (gain_in, bias_in, gain_out, bias_out)]
    found = [torch.empty_like(x) for x in (roi, weight_in, weight_out)]
    # A row a query, added up below in a fixed order.
    rows = [torch.empty(len(roi), x.shape[1], dtype=torch.float32, device=roi.device) for x in norms]
    if roi.numel():
        sizes = (*roi.shape[1:], weight_in.shape[-1])
        outer, inner = backward_constants(sizes, roi.dtype)
        sizes = (len(roi) // len(gain_in), *sizes)
        d_hidden = torch.empty(*roi.shape[:2], weight_in.shape[-1], dtype=torch.float32, device=roi.device)
        _dynamic_interaction_bwd_out_kernel[(len(roi),)](
            roi,
            weight_in,
            weight_out,
            *norms,
            d_mixed.contiguous(),
            statistics,
            d_hidden,
            found[2],
            *rows[2:],
            *sizes,
            **outer,
            **BACKWARD,
        )
        _dynamic_interaction_bwd_in_kernel[(len(roi),)](
            roi,
            weight_in,
            *norms[:2],
            statistics,
            d_hidden,
            *found[:2],
            *rows[:2],
            *sizes,
            **inner,
            **BACKWARD,
        )
    return *found, *(row.view(len(gain_in), -1, row.shape[1]).sum(1) for row in rows)


@_backward.register_fake
def _(*tensors):
    like = [x.new_empty(x.shape) for x in tensors[:3]]
    return *like, *(x.new_empty(x.shape, dtype=torch.float32) for x in tensors[3:7])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, d_mixed, _):
    *inputs, statistics = ctx.saved_tensors
    if statistics.numel() == 0 and d_mixed.numel() > 0:
        raise RuntimeError("dfm::dynamic_interaction was called without statistics, which its backward needs")
    found = _backward(*inputs, d_mixed, statistics)
    return *(gradient.to(x.dtype) for gradient, x in zip(found, inputs)), None


dynamic_interaction.register_autograd(_gradients, setup_context=_setup_context)
