"""Triton kernels of the gradients of dynamic_interaction, from the statistics that its forward leaves.

What the forward had on the chip is made again, in two launches, one for each product: in a single one the
registers would not do. Letters and shapes are those of dfm_kernels.triton.dynamic_interaction.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfm_kernels.triton.dynamic_interaction import _product_in, _store_tile, _tile, _vector, constants

BACKWARD = {"num_warps": 8, "num_stages": 1}


class Gradients(NamedTuple):
    """By roi and both matrices in their dtype, by the norms' gains and biases in float32 `(D, H or C)`."""

    roi: Tensor
    weight_in: Tensor
    weight_out: Tensor
    gain_in: Tensor
    bias_in: Tensor
    gain_out: Tensor
    bias_out: Tensor


@triton.jit
def _hidden(
    roi_ptr, weight_in_ptr, gain_ptr, bias_ptr, statistics_ptr, p, h, num_cells, num_channels, num_hidden,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Normalised product, 1/std and activation of the first half of one query, from its statistics."""
    mean = tl.load(statistics_ptr + 4 * p, mask=p < num_cells, other=0.0)
    rstd = tl.load(statistics_ptr + 4 * p + 1, mask=p < num_cells, other=0.0)
    product = _product_in(
        roi_ptr, weight_in_ptr, p, h, num_cells, num_channels, num_hidden, BLOCK_P, BLOCK_H, CHUNK, PRECISION
    )
    normed = tl.where((h < num_hidden)[None, :], (product - mean[:, None]) * rstd[:, None], 0.0)
    gain, bias = _vector(gain_ptr, h, num_hidden), _vector(bias_ptr, h, num_hidden)
    return normed, rstd, tl.maximum(normed * gain[None, :] + bias[None, :], 0.0)


@triton.jit
def _outer_tile(
    hidden, weight_ptr, gain_ptr, bias_ptr, d_mixed_ptr, mean, rstd, p, h, c, num_cells, num_channels,
    num_hidden, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk of channels: W_out, its LayerNorm's output and gain, and the gradient behind the ReLU."""
    weight = _tile(weight_ptr, h, c, num_hidden, num_channels)
    normed = (tl.dot(hidden, weight, input_precision=PRECISION) - mean[:, None]) * rstd[:, None]
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
    PRECISION: tl.constexpr,
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
    normed_in, rstd_in, hidden = _hidden(
        roi_ptr + m * num_cells * num_channels, weight_in_ptr + matrix, gain_in_ptr + norms * num_hidden,
        bias_in_ptr + norms * num_hidden, statistics_ptr, p, h, num_cells, num_channels, num_hidden,
        BLOCK_P, BLOCK_H, CHUNK, PRECISION,
    )  # fmt: skip
    hidden = hidden.to(roi_ptr.dtype.element_ty)
    mean = tl.load(statistics_ptr + 4 * p + 2, mask=p < num_cells, other=0.0)
    rstd = tl.load(statistics_ptr + 4 * p + 3, mask=p < num_cells, other=0.0)

    # LayerNorm's gradient needs two means over a whole row before any element: one pass for them ...
    mean_1, mean_2 = tl.zeros([BLOCK_P], tl.float32), tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        weight, normed, gain, d = _outer_tile(
            hidden, weight_out_ptr, gain_out_ptr, bias_out_ptr, d_mixed_ptr, mean, rstd, p, h, c,
            num_cells, num_channels, num_hidden, PRECISION,
        )  # fmt: skip
        tl.store(d_bias_out_ptr + m * num_channels + c, tl.sum(d, axis=0), mask=c < num_channels)
        tl.store(d_gain_out_ptr + m * num_channels + c, tl.sum(d * normed, axis=0), mask=c < num_channels)
        mean_1 += tl.sum(d * gain[None, :], axis=1) / num_channels
        mean_2 += tl.sum(d * gain[None, :] * normed, axis=1) / num_channels

    # ... and one for the products.
    d_hidden = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        weight, normed, gain, d = _outer_tile(
            hidden, weight_out_ptr, gain_out_ptr, bias_out_ptr, d_mixed_ptr, mean, rstd, p, h, c,
            num_cells, num_channels, num_hidden, PRECISION,
        )  # fmt: skip
        d = rstd[:, None] * (d * gain[None, :] - mean_1[:, None] - normed * mean_2[:, None])
        d = tl.where((c < num_channels)[None, :], d, 0.0).to(weight.dtype)
        d_weight = tl.dot(tl.trans(hidden), d, input_precision=PRECISION)
        _store_tile(d_weight_out_ptr + matrix, d_weight, h, c, num_hidden, num_channels)
        d_hidden += tl.dot(d, tl.trans(weight), input_precision=PRECISION)
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
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    norms = m // num_queries_of_a_set
    p, h = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_H)
    grid, matrix = m * num_cells * num_channels, m * num_channels * num_hidden
    gain_in_ptr += norms * num_hidden
    normed, rstd, hidden = _hidden(
        roi_ptr + grid, weight_in_ptr + matrix, gain_in_ptr, bias_in_ptr + norms * num_hidden,
        statistics_ptr + m * num_cells * 4, p, h, num_cells, num_channels, num_hidden,
        BLOCK_P, BLOCK_H, CHUNK, PRECISION,
    )  # fmt: skip
    d = _tile(d_hidden_ptr + m * num_cells * num_hidden, p, h, num_cells, num_hidden)
    d = tl.where(hidden > 0, d, 0.0)
    tl.store(d_bias_in_ptr + m * num_hidden + h, tl.sum(d, axis=0), mask=h < num_hidden)
    tl.store(d_gain_in_ptr + m * num_hidden + h, tl.sum(d * normed, axis=0), mask=h < num_hidden)
    d = d * _vector(gain_in_ptr, h, num_hidden)[None, :]
    mean_1 = tl.sum(d, axis=1) / num_hidden
    mean_2 = tl.sum(d * normed, axis=1) / num_hidden
    d = rstd[:, None] * (d - mean_1[:, None] - normed * mean_2[:, None])
    d = tl.where((h < num_hidden)[None, :], d, 0.0).to(roi_ptr.dtype.element_ty)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        roi = _tile(roi_ptr + grid, p, c, num_cells, num_channels)
        weight = _tile(weight_in_ptr + matrix, c, h, num_channels, num_hidden)
        d_weight = tl.dot(tl.trans(roi), d, input_precision=PRECISION)
        _store_tile(d_weight_in_ptr + matrix, d_weight, c, h, num_channels, num_hidden)
        d_roi = tl.dot(d, tl.trans(weight), input_precision=PRECISION)
        _store_tile(d_roi_ptr + grid, d_roi, p, c, num_cells, num_channels)


def backward_constants(
    num_cells: int, num_channels: int, num_hidden: int, dtype: torch.dtype
) -> tuple[dict, dict]:
    """Those of the launch for the outer half and of that for the inner one."""
    # The largest chunks that do not spill on sm_80, sm_90 and gfx942.
    chunks = (16 if dtype == torch.float32 else 32, 64)
    return tuple(constants(num_cells, num_channels, num_hidden, dtype, chunk) for chunk in chunks)


def dynamic_interaction_backward(
    roi: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gain_in: Tensor,
    bias_in: Tensor,
    gain_out: Tensor,
    bias_out: Tensor,
    d_mixed: Tensor,
    statistics: Tensor,
) -> Gradients:
    """Gradients by the seven arguments of dynamic_interaction from that by its answer, `(M, P^2, C)`."""
    num_queries, num_cells, num_channels = roi.shape
    num_hidden, num_sets = weight_in.shape[-1], gain_in.shape[0]
    roi, weight_in, weight_out = (x.contiguous() for x in (roi, weight_in, weight_out))
    norms = [x.contiguous() for x in (gain_in, bias_in, gain_out, bias_out)]
    found = [torch.empty_like(x) for x in (roi, weight_in, weight_out)]
    # A row a query, added up below in a fixed order.
    rows = [torch.empty(num_queries, x.shape[1], dtype=torch.float32, device=roi.device) for x in norms]
    if roi.numel():
        d_hidden = torch.empty(num_queries, num_cells, num_hidden, dtype=torch.float32, device=roi.device)
        sizes = (num_queries // num_sets, num_cells, num_channels, num_hidden)
        outer, inner = backward_constants(num_cells, num_channels, num_hidden, roi.dtype)
        _dynamic_interaction_bwd_out_kernel[(num_queries,)](
            roi, weight_in, weight_out, *norms, d_mixed.contiguous(), statistics,
            d_hidden, found[2], *rows[2:], *sizes, **outer, **BACKWARD,
        )  # fmt: skip
        _dynamic_interaction_bwd_in_kernel[(num_queries,)](
            roi, weight_in, *norms[:2], statistics, d_hidden, *found[:2], *rows[:2],
            *sizes, **inner, **BACKWARD,
        )  # fmt: skip
    return Gradients(*found, *[row.view(num_sets, -1, row.shape[1]).sum(1) for row in rows])
