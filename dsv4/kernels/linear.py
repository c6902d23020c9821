"""FP8 matrices on Hopper: a kernel for few tokens (here), one for many (linear_wide.py), both with the same bits."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels import linear_wide
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.rows import NAMES
from dsv4.kernels.tiles import tensor_map
from dsv4.ops.linear import scaled_matmul
from dsv4.quant.formats import FP8_BLOCK, FP8_ROW
from dsv4.quant.tensor import QTensor

# As csrc/linear_fp8.cu has them.
_TILE_ROWS: Final = 64
_COLUMNS: Final = 128
_TILE_BYTES: Final = _TILE_ROWS * _COLUMNS
_THREADS: Final = 160
_INBOXES: Final = 4
_TOKENS: Final = (8, 16, 32)  # the kernels' own numbers; more tokens are taken in several turns
FEW: Final = 32  # tokens up to which this kernel is the faster one: by bench/linear_wide.py
_KERNELS: Final = {
    (dtype, t): Kernel("linear_fp8.cu", f"linear_fp8_{name}_{t}", "m p p p p i i i i")
    for dtype, name in NAMES.items()
    for t in _TOKENS
}
MULTIPROCESSORS: Final = 132  # of an H100 and an H200; any number gives the same bits
_SHARED: Final = 228 << 10  # bytes of a multiprocessor
_RESERVED: Final = 2 << 10  # of them for each block: the driver's, and the kernel's barriers
_STAGES: Final = 10
_FEWEST: Final = 4
_SHORT: Final = 6  # a ring that is too short loses more than early copies gain
_LARGEST: Final = 4  # blocks of a cluster: eight lose more by what they tell each other than they gain


class Form(NamedTuple):
    """How a matrix lies on blocks. `segments`, which decide the order of the sums, follow from its shape alone."""

    segments: int
    clusters: int


@lru_cache
def form(rows: int, columns: int) -> Form:
    """Segments of about eight tiles, and as many clusters as find room: by bench/linear_forms.py."""
    tiles, blocks = rows // _TILE_ROWS, columns // _COLUMNS
    segments = 1
    while segments < _LARGEST and blocks // (2 * segments) >= 8:
        segments *= 2
    return Form(segments, min(tiles, 2 * MULTIPROCESSORS // segments))


@lru_cache
def memory(form: Form, rows: int, columns: int, tokens: int) -> tuple[int, int]:
    """Stages of the ring, and bytes of dynamic shared memory, as the kernel cuts them up.

    The next kernel's weights are on their way early if its blocks find room beside ours: two to a multiprocessor, three
    where we take more than one of each and a ring of some length remains.
    """
    most = -(-(columns // _COLUMNS) // form.segments)
    turns = -(-(rows // _TILE_ROWS) // form.clusters)
    inboxes = -(-turns // form.segments) * form.segments if form.segments > 1 else 0
    floats = most * tokens + inboxes * _TILE_ROWS * tokens + turns * most
    fixed = most * tokens * _COLUMNS + 4 * floats
    crowded = form.segments > 1 and form.segments * form.clusters > MULTIPROCESSORS
    rings = [(_SHARED // beside - _RESERVED - fixed) // _TILE_BYTES for beside in (3, 2)]
    stages = max(_FEWEST, min(_STAGES, rings[0] if crowded and rings[0] >= _SHORT else rings[1]))
    return stages, stages * _TILE_BYTES + fixed


def _refuse(x: QTensor, weight: QTensor, dtype: torch.dtype) -> str | None:
    if not x.data.is_cuda:
        return f"x is on {x.device}"
    if x.format is not FP8_ROW or weight.format is not FP8_BLOCK:
        return f"x is {x.format.name} and the weight {weight.format.name}"
    if dtype not in NAMES:
        return f"no kernel gives {str(dtype).removeprefix('torch.')}"
    rows, columns = weight.shape
    if rows % _TILE_ROWS or columns % _COLUMNS or not rows * columns:
        return f"a matrix of {rows} x {columns}: wanted multiples of {_TILE_ROWS} and {_COLUMNS}"
    if form(rows, columns).segments > 1 and rows > _TILE_ROWS * form(rows, columns).clusters * _INBOXES:
        return f"a matrix of {rows} rows of {columns}"
    return None


@scaled_matmul.impl("fused", accepts=_refuse)
def _scaled_matmul(x: QTensor, weight: QTensor, dtype: torch.dtype) -> Tensor:
    (tokens, columns), rows = x.shape, weight.shape[0]
    y = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    need(weight.data, "weight", shape=(rows, columns), device=x.device, align=16)
    need(weight.scale, "weight scale", device=x.device)
    need(x.data, "x", device=x.device, align=16)
    need(x.scale, "x scale", device=x.device)
    if tokens > FEW:
        segments = form(rows, columns).segments
        linear_wide.launch(x, weight, y, segments, linear_wide.plan(rows, segments, tokens))
    else:
        few(x, weight, y)
    return y


def few(x: QTensor, weight: QTensor, y: Tensor) -> None:
    """y [T, rows] of x [T, K] and weight [rows, K], up to 32 tokens at a time."""
    (tokens, columns), rows = x.shape, weight.shape[0]
    tiles, chosen = tensor_map(weight.data, _TILE_ROWS, _COLUMNS), form(rows, columns)
    for start in range(0, tokens, _TOKENS[-1]):
        part = slice(start, start + _TOKENS[-1])
        count = min(tokens - start, _TOKENS[-1])
        wide = next(t for t in _TOKENS if t >= count)
        given = (tiles, weight.scale, x.data[part], x.scale[part], y[part])
        stages, smem = memory(chosen, rows, columns, wide)
        sizes = (rows // _TILE_ROWS, columns // _COLUMNS, count, stages)
        grid = chosen.segments * chosen.clusters
        _KERNELS[y.dtype, wide](grid, _THREADS, *given, *sizes, smem=smem, cluster=chosen.segments, pdl=True)
