"""Activations as stored rows, on a GPU."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel
from dsv4.kernels.rows import NAMES, STORED, THREADS, refuse_format, refuse_rows, shape_rows, stored_rows
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import Format
from dsv4.quant.rows import GlobalScale
from dsv4.quant.tensor import QTensor

MOST: Final = {torch.bfloat16: 16384, torch.float32: 8192}  # columns of a row
_ROW: Final = "p l i i i i"  # x, stride, rows, n, slots, warps
# Chunks of a warp: two where a block has no threads for one. Else one is never slower (bench/row_forms.py).
_VARIANTS: Final = ((torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float32, 1))
_QUANTIZE: Final = {
    (fmt, t, v): Kernel("quantize.cu", f"quantize_{fmt.name}_{NAMES[t]}_{v}", _ROW + "p p p p")
    for fmt in STORED
    for t, v in _VARIANTS
}
_TOPS: Final = {(t, v): Kernel("quantize.cu", f"row_tops_{NAMES[t]}_{v}", _ROW + "p") for t, v in _VARIANTS}
_WHOLE: Final = Kernel("quantize.cu", "whole_scale", "p i p")
_WHOLE_BLOCK: Final = 1024


def _refuse(x: Tensor, fmt: Format, scale: GlobalScale = None) -> str | None:
    return refuse_format(fmt) or refuse_rows("x", _folded(x, fmt), MOST.get(x.dtype, 0))


def _folded(x: Tensor, fmt: Format) -> Tensor:
    """[T, n] as rows that a block has threads for, unless a scale is that of a whole row."""
    most = MOST.get(x.dtype, x.shape[-1])
    if x.shape[-1] <= most or x.dim() != 2 or not x.is_contiguous() or fmt.has_global_scale:
        return x
    parts = -(-x.shape[1] // most)
    return x if x.shape[1] % (parts * fmt.block[1]) else x.view(-1, x.shape[1] // parts)


def _chunks(x: Tensor) -> int:
    return 1 if x.dtype == torch.float32 or x.shape[1] <= 8192 else 2


@quantize.impl("fused", accepts=_refuse)
def quantize_rows(x: Tensor, fmt: Format, scale: GlobalScale = None) -> QTensor:
    """`quantize`. The scale of all rows takes two kernels more: the tops of the rows, and theirs."""
    if (folded := _folded(x, fmt)) is not x:
        made = quantize_rows(folded, fmt, scale)
        return QTensor(made.data.view(fmt.data_shape(*x.shape)), made.scale.view(fmt.scale_shape(*x.shape)), fmt)
    rows, n = x.shape
    grid, block, slots, warps, chunks = shape_rows(x, _chunks(x), 2 * THREADS)
    arguments = (x, x.stride(0), rows, n, slots, warps)
    if isinstance(scale, str) and scale == "tensor":
        tops = torch.empty(rows, dtype=torch.int32, device=x.device)
        scale = torch.empty((), device=x.device)
        _TOPS[x.dtype, chunks](grid, block, *arguments, tops, pdl=True)
        _WHOLE(1, _WHOLE_BLOCK, tops, rows, scale, pdl=True)
    stored, places = stored_rows(rows, n, fmt, scale, x.device)
    _QUANTIZE[fmt, x.dtype, chunks](grid, block, *arguments, *places, pdl=True)
    return stored
