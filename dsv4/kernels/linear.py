"""FP8 matrices on Hopper: a kernel for few tokens (here), one for many (linear_wide.py), both with the same bits."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels import linear_wide
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.quantize import MOST, quantize_rows
from dsv4.kernels.rows import NAMES, refuse_format, refuse_rows
from dsv4.kernels.tiles import tensor_map
from dsv4.ops.linear import grouped_scaled_matmul, linear, scaled_matmul
from dsv4.quant.formats import FP8_BLOCK, FP8_ROW
from dsv4.quant.rounding import FP8, Rounding
from dsv4.quant.tensor import QTensor

# As csrc/linear_fp8.cu has them.
TILE_ROWS: Final = 64
COLUMNS: Final = 128
TILE_BYTES: Final = TILE_ROWS * COLUMNS
THREADS: Final = 160
_INBOXES: Final = 4
TOKENS: Final = (8, 16, 32)  # the kernels' own numbers; more tokens are taken in several turns
FEW: Final = 32  # tokens up to which this kernel is the faster one: by bench/linear_wide.py
_KERNELS: Final = {
    (dtype, t): Kernel("linear_fp8.cu", f"linear_fp8_{name}_{t}", "m p p p p i i i i i")
    for dtype, name in NAMES.items()
    for t in TOKENS
}
MULTIPROCESSORS: Final = 132  # of an H100 and an H200; any number gives the same bits
_SHARED: Final = 228 << 10  # bytes of a multiprocessor
_RESERVED: Final = 2 << 10  # of them for each block: the driver's, and the kernel's barriers
_STAGES: Final = 10
_FEWEST: Final = 4
_SHORT: Final = 6  # a ring that is too short loses more than early copies gain
_LARGEST: Final = 4  # blocks of a cluster: eight lose more by what they tell each other than they gain


class Form(NamedTuple):
    """How a matrix lies on blocks. `segments`, which decide the order of the sums, follow from its columns alone.

    clusters: as many for each of the groups of rows that have columns of their own. turns: most tiles of a cluster.
    """

    segments: int
    clusters: int
    turns: int


@lru_cache
def form(rows: int, columns: int, groups: int = 1) -> Form:
    """Segments of about eight tiles, and as many clusters as find room: by bench/linear_forms.py."""
    tiles, blocks = rows // TILE_ROWS // groups, columns // COLUMNS
    segments = 1
    while segments < _LARGEST and blocks // (2 * segments) >= 8:
        segments *= 2
    each = max(1, min(tiles, 2 * MULTIPROCESSORS // segments // groups))
    return Form(segments, each * groups, -(-tiles // each))


@lru_cache
def memory(form: Form, columns: int, tokens: int) -> tuple[int, int]:
    """Stages of the ring, and bytes of dynamic shared memory, as the kernel cuts them up.

    The next kernel's weights are on their way early if its blocks find room beside ours: two to a multiprocessor, three
    where we take more than one of each and a ring of some length remains.
    """
    most = -(-(columns // COLUMNS) // form.segments)
    inboxes = -(-form.turns // form.segments) * form.segments if form.segments > 1 else 0
    floats = most * tokens + inboxes * TILE_ROWS * tokens + form.turns * most
    fixed = most * tokens * COLUMNS + 4 * floats
    crowded = form.segments > 1 and form.segments * form.clusters > MULTIPROCESSORS
    stages = ring(fixed, beside=3) if crowded else 0
    stages = stages if stages >= _SHORT else ring(fixed, beside=2)
    return stages, stages * TILE_BYTES + fixed


def ring(fixed: int, beside: int) -> int:
    """Stages of a ring where blocks that have `fixed` bytes more lie `beside` each other on a multiprocessor."""
    return max(_FEWEST, min(_STAGES, (_SHARED // beside - _RESERVED - fixed) // TILE_BYTES))


def _refuse(x: QTensor, weight: QTensor, dtype: torch.dtype) -> str | None:
    return _refuse_groups(x, weight, 1, dtype)


def _refuse_groups(x: QTensor, weight: QTensor, groups: int, dtype: torch.dtype) -> str | None:
    if not x.data.is_cuda:
        return f"x is on {x.device}"
    if x.format is not FP8_ROW:
        return f"x is {x.format.name}"
    return _refuse_matrix(weight, groups, dtype)


def _refuse_linear(x: Tensor, weight: Tensor | QTensor, rounding: Rounding) -> str | None:
    if not isinstance(weight, QTensor) or rounding is not FP8:
        return "the weight is dense, or x not rounded to E4M3 by 128"
    return refuse_format(FP8_ROW) or refuse_rows("x", x, MOST.get(x.dtype, 0)) or _refuse_matrix(weight, 1, x.dtype)


def _refuse_matrix(weight: QTensor, groups: int, dtype: torch.dtype) -> str | None:
    if weight.format is not FP8_BLOCK:
        return f"the weight is {weight.format.name}"
    if dtype not in NAMES:
        return f"no kernel gives {str(dtype).removeprefix('torch.')}"
    rows, columns = weight.shape
    high = TILE_ROWS if groups == 1 else linear_wide.TILE  # no tile belongs to two groups
    if rows % (high * groups) or columns % COLUMNS or not rows * columns:
        return f"{groups} matrices of {rows / groups:g} x {columns}: wanted multiples of {high} and {COLUMNS}"
    chosen = form(rows, columns, groups)
    if chosen.segments > 1 and chosen.turns > _INBOXES:
        return f"a matrix of {rows} rows of {columns}"
    return None


@scaled_matmul.impl("fused", accepts=_refuse)
def _scaled_matmul(x: QTensor, weight: QTensor, dtype: torch.dtype) -> Tensor:
    return _grouped_scaled_matmul(x, weight, 1, dtype)


@linear.impl("fused", accepts=_refuse_linear)
def _linear(x: Tensor, weight: Tensor | QTensor, rounding: Rounding) -> Tensor:
    assert isinstance(weight, QTensor)
    return _scaled_matmul(quantize_rows(x, FP8_ROW), weight, x.dtype)


@grouped_scaled_matmul.impl("fused", accepts=_refuse_groups)
def _grouped_scaled_matmul(x: QTensor, weight: QTensor, groups: int, dtype: torch.dtype) -> Tensor:
    tokens, (rows, columns) = x.shape[0], weight.shape
    y = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    need(weight.data, "weight", device=x.device, align=16)
    need(weight.scale, "weight scale", device=x.device)
    need(x.data, "x", shape=(tokens, groups * columns), device=x.device, align=16)
    need(x.scale, "x scale", device=x.device)
    if tokens > FEW:
        segments = form(rows, columns, groups).segments
        linear_wide.launch(x, weight, y, groups, segments, linear_wide.plan(rows, segments, tokens))
    else:
        few(x, weight, y, groups)
    return y


def few(x: QTensor, weight: QTensor, y: Tensor, groups: int = 1) -> None:
    """y [T, rows] of x [T, groups * K] and weight [rows, K], up to 32 tokens at a time."""
    tokens, (rows, columns) = x.shape[0], weight.shape
    tiles, chosen = tensor_map(weight.data, TILE_ROWS, COLUMNS), form(rows, columns, groups)
    for start in range(0, tokens, TOKENS[-1]):
        part = slice(start, start + TOKENS[-1])
        count = min(tokens - start, TOKENS[-1])
        wide = next(t for t in TOKENS if t >= count)
        given = (tiles, weight.scale, x.data[part], x.scale[part], y[part])
        stages, smem = memory(chosen, columns, wide)
        sizes = (rows // TILE_ROWS, columns // COLUMNS, count, groups, stages)
        grid = chosen.segments * chosen.clusters
        _KERNELS[y.dtype, wide](grid, THREADS, *given, *sizes, smem=smem, cluster=chosen.segments, pdl=True)
