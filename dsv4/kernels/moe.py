"""SwiGLU on a GPU, alone and with the routing weight and the quantiser behind it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel, need
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
)
from dsv4.ops.moe import swiglu, swiglu_quant
from dsv4.quant.formats import NVFP4, Format
from dsv4.quant.rows import GlobalScale
from dsv4.quant.tensor import QTensor

MOST: Final = 8192  # columns of a row
_GATED: Final = "p p l l f"  # gate, up, their strides, limit
_SWIGLU: Final = {(t, 1): Kernel("moe.cu", f"swiglu_{NAMES[t]}_1", _GATED + "i i i i p") for t in NAMES}
_WEIGHED: Final = {(t, 1): Kernel("moe.cu", f"swiglu_weighed_{NAMES[t]}_1", _GATED + "p i i i i p") for t in NAMES}
_FORMS: Final = [*((fmt, t, 1) for fmt in STORED for t in NAMES), (NVFP4, torch.bfloat16, 2)]
_QUANT: Final = {
    (fmt, t, v): Kernel("moe.cu", f"swiglu_{fmt.name}_{NAMES[t]}_{v}", _GATED + "p i i i i p p p p")
    for fmt, t, v in _FORMS
}


def _refuse(gate: Tensor, up: Tensor, limit: float) -> str | None:
    if gate.dtype != up.dtype or gate.dim() != 2:
        return f"gate is {gate.dtype} {list(gate.shape)} and up {up.dtype} {list(up.shape)}"
    return refuse_rows("gate", gate, MOST) or refuse_rows("up", up, MOST)


def _inputs(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int, int]:
    need(up, "up", shape=gate.shape, dtype=gate.dtype, device=gate.device, contiguous=False)
    return gate, up, gate.stride(0), up.stride(0)


@swiglu.impl("fused", accepts=_refuse)
def _swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    y = torch.empty(gate.shape, device=gate.device)
    grid, block, slots, warps, chunks = shape_rows(gate, 1, 2 * THREADS)
    _SWIGLU[gate.dtype, chunks](grid, block, *_inputs(gate, up), limit, *gate.shape, slots, warps, y, pdl=True)
    return y


def _refuse_quant(
    gate: Tensor, up: Tensor, limit: float, weight: Tensor | None, fmt: Format, scale: GlobalScale = None
) -> str | None:
    return _refuse(gate, up, limit) or refuse_format(fmt)


def _chunks(fmt: Format, gate: Tensor) -> int:
    """Of a warp: two where instructions are what takes the time."""
    rows, n = gate.shape
    return 2 if fmt is NVFP4 and gate.dtype == torch.bfloat16 and rows > FEW and n > 256 else 1


@swiglu_quant.impl("fused", accepts=_refuse_quant)
def _swiglu_quant(
    gate: Tensor, up: Tensor, limit: float, weight: Tensor | None, fmt: Format, scale: GlobalScale = None
) -> QTensor:
    rows, n = gate.shape
    if weight is not None:
        need_vector(weight, "weight", rows, gate.device)
    whole = isinstance(scale, str) and scale == "tensor"  # known after the last row: then once more over all
    form = 1 if whole else _chunks(fmt, gate)
    grid, block, slots, warps, chunks = shape_rows(gate, form, 2 * THREADS)
    arguments = (*_inputs(gate, up), limit, weight, rows, n, slots, warps)
    if whole:
        hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _WEIGHED[gate.dtype, chunks](grid, block, *arguments, hidden, pdl=True)
        return quantize_rows(hidden, fmt, scale)
    stored, places = stored_rows(rows, n, fmt, scale, gate.device)
    _QUANT[fmt, gate.dtype, chunks](grid, block, *arguments, *places, pdl=True)
    return stored
