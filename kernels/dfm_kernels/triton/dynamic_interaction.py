"""Triton kernels of the dynamic interaction: both products and both LayerNorms of a query on the chip.

The specification is dfm_kernels.reference.dynamic_interaction; the letters are the same. A program owns one
query and leaves mean and 1/std of both LayerNorms (4 numbers a cell) to dynamic_interaction_backward.
Dots take the inputs' dtype and accumulate in float32; float32 inputs are multiplied as TF32.
Shapes: M queries, P^2 cells, C channels, H dynamic channels, D sets of norms (query m takes set m D // M).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD = {"num_warps": 8}
EPS = 1e-5  # torch.nn.functional.layer_norm's


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
def _product_in(
    roi_ptr, weight_in_ptr, p, h, num_cells, num_channels, num_hidden,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`roi W_in` `(P^2, H)` of one query."""
    product = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for start in range(0, num_channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        roi = _tile(roi_ptr, p, c, num_cells, num_channels)
        weight = _tile(weight_in_ptr, c, h, num_channels, num_hidden)
        product += tl.dot(roi, weight, input_precision=PRECISION)
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
    PRECISION: tl.constexpr,
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
    product = _product_in(
        roi_ptr, weight_in_ptr, p, h, num_cells, num_channels, num_hidden, BLOCK_P, BLOCK_H, CHUNK, PRECISION
    )
    mean_in = tl.sum(product, axis=1) / num_hidden
    centred = tl.where((h < num_hidden)[None, :], product - mean_in[:, None], 0.0)
    rstd_in = tl.rsqrt(tl.sum(centred * centred, axis=1) / num_hidden + eps)
    gain = _vector(gain_in_ptr + norms * num_hidden, h, num_hidden)
    bias = _vector(bias_in_ptr + norms * num_hidden, h, num_hidden)
    hidden = tl.maximum(centred * rstd_in[:, None] * gain[None, :] + bias[None, :], 0.0)

    weight_out = _tile(weight_out_ptr, h, c, num_hidden, num_channels)
    product_out = tl.dot(hidden.to(weight_out.dtype), weight_out, input_precision=PRECISION)
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


def block(count: int) -> int:
    """Side of a tile; a dot needs at least 16."""
    return max(triton.next_power_of_2(count), 16)


def precision_of(dtype: torch.dtype) -> str:
    """How dots of this dtype multiply."""
    return "tf32" if dtype == torch.float32 else "ieee"


def constants(num_cells: int, num_channels: int, num_hidden: int, dtype: torch.dtype, chunk: int) -> dict:
    """Compile-time constants of the kernels, of which one works on `chunk` channels at a time."""
    return {
        "PRECISION": precision_of(dtype),
        "BLOCK_P": block(num_cells),
        "BLOCK_H": block(num_hidden),
        "CHUNK": min(block(num_channels), chunk),
    }


def forward_constants(num_cells: int, num_channels: int, num_hidden: int, dtype: torch.dtype) -> dict:
    """Those of the forward but STATISTICS."""
    return constants(num_cells, num_channels, num_hidden, dtype, 64) | {"BLOCK_C": block(num_channels)}


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
    num_queries, num_cells, num_channels = roi.shape
    num_hidden = weight_in.shape[-1]
    roi = roi.contiguous()
    mixed = torch.empty_like(roi)
    shape = (num_queries, num_cells, 4) if statistics else (0,)
    found = torch.empty(shape, dtype=torch.float32, device=roi.device)
    if mixed.numel():
        _dynamic_interaction_fwd_kernel[(num_queries,)](
            roi,
            weight_in.contiguous(),
            weight_out.contiguous(),
            gain_in.contiguous(),
            bias_in.contiguous(),
            gain_out.contiguous(),
            bias_out.contiguous(),
            mixed,
            found,
            num_queries // gain_in.shape[0],
            num_cells,
            num_channels,
            num_hidden,
            EPS,
            STATISTICS=statistics,
            **forward_constants(num_cells, num_channels, num_hidden, roi.dtype),
            **FORWARD,
        )
    return mixed, found
