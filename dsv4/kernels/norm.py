"""RMS norm on a GPU, alone and with the quantiser behind it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.heads import Heads, refuse_heads
from dsv4.kernels.launch import Kernel
from dsv4.kernels.quantize import quantize_rows
from dsv4.kernels.rows import (
    FEW,
    NAMES,
    STORED,
    THREADS,
    need_vector,
    refuse_format,
    refuse_rows,
    shape_rows,
    stored_rows,
)  # fmt: skip
from dsv4.ops.norm import rms_norm, rms_norm_quant, unit_rms
from dsv4.quant.formats import Format
from dsv4.quant.rows import GlobalScale
from dsv4.quant.tensor import QTensor

MOST: Final = 16384  # columns of a row that is normalised
MOST_STORED: Final = 8192  # and of one that is stored as well
_ROW: Final = "p l p f p i i i i"  # x, stride, weight, eps, y, rows, n, slots, warps

_NORM: Final = {(t, v): Kernel("norm.cu", f"rms_norm_{NAMES[t]}_{v}", _ROW) for t in NAMES for v in (1, 2, 4)}
_QUANT: Final = {
    (fmt, t, v): Kernel("norm.cu", f"rms_norm_{fmt.name}_{NAMES[t]}_{v}", _ROW + "p p p p")
    for fmt in STORED
    for t in NAMES
    for v in (1, 2)
}
_UNIT: Final = {(t, v): Kernel("norm.cu", f"unit_rms_{NAMES[t]}_{v}", "p l l i i i f p") for t in NAMES for v in (1, 2)}


def _chunks(rows: int, n: int) -> int:
    if n > 8192:
        return 4
    return 1 if rows <= FEW or n <= 256 else 2


def threads(fmt: Format | None, dtype: torch.dtype) -> int:
    """That a multiprocessor is asked to hold at once of the kernel for many rows; bench/row_forms.py compares."""
    if dtype == torch.float32:
        return THREADS // 2
    return THREADS if fmt else 2 * THREADS


def _refuse(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return refuse_rows("x", x, MOST)


@rms_norm.impl("fused", accepts=_refuse)
def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
    need_vector(weight, "weight", rows.shape[1], x.device)
    grid, block, slots, warps, chunks = shape_rows(rows, _chunks(*rows.shape), threads(None, x.dtype))
    kernel = _NORM[x.dtype, chunks]
    kernel(grid, block, rows, rows.stride(0), weight, eps, y, *rows.shape, slots, warps, pdl=True)
    return y


def _refuse_quant(x: Tensor, weight: Tensor, eps: float, fmt: Format, scale: GlobalScale = None) -> str | None:
    return refuse_rows("x", x, MOST_STORED) or refuse_format(fmt)


@rms_norm_quant.impl("fused", accepts=_refuse_quant)
def _norm_quant(
    x: Tensor, weight: Tensor, eps: float, fmt: Format, scale: GlobalScale = None
) -> tuple[Tensor, QTensor]:
    if isinstance(scale, str) and scale == "tensor":  # known after the last row: then once more over all
        y = _norm(x, weight, eps)
        return y, quantize_rows(y, fmt, scale)
    rows, n = x.shape
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    need_vector(weight, "weight", n, x.device)
    stored, places = stored_rows(rows, n, fmt, scale, x.device)
    grid, block, slots, warps, chunks = shape_rows(x, _chunks(rows, n), threads(fmt, x.dtype))
    kernel = _QUANT[fmt, x.dtype, chunks]
    kernel(grid, block, x, x.stride(0), weight, eps, y, rows, n, slots, warps, *places, pdl=True)
    return y, stored


def _refuse_unit(x: Tensor, eps: float) -> str | None:
    return refuse_heads("x", x)


@unit_rms.impl("fused", accepts=_refuse_unit)
def _unit(x: Tensor, eps: float) -> Tensor:
    heads, y = Heads.of(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _UNIT[x.dtype, heads.chunks](heads.grid, heads.block, x, *heads.arguments, eps, y, pdl=True)
    return y
