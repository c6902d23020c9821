"""Query heads straight from their FP8 matrix, on Hopper: one kernel for few tokens, two for many, of the same bits."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from dsv4.kernels import linear
from dsv4.kernels.heads import need_turn, refuse_eights
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.rope import norm_heads
from dsv4.kernels.rows import NAMES
from dsv4.kernels.tiles import ClusterForm, tensor_map
from dsv4.ops.linear import scaled_matmul
from dsv4.ops.linear_heads import scaled_matmul_q_norm_rope
from dsv4.ops.rope import Rotation
from dsv4.quant.tensor import QTensor

# As csrc/linear_heads.cu has them.
HEAD: Final = 512
_TILES: Final = HEAD // linear.TILE_ROWS
_PITCH: Final = 72
_BARRIERS: Final = 512  # bytes, and more than they take
_KERNELS: Final = {
    (dtype, t): Kernel("linear_heads.cu", f"linear_heads_{name}_{t}", "m p p p p i i i f p p i")
    for dtype, name in NAMES.items()
    for t in linear.TOKENS
}
# Blocks of a cluster, and how many of them an H100 or H200 surely holds at once. Two find room on a multiprocessor; but
# parts of the GPU have different numbers of these, and clusters leave some idle: 64 of four blocks took two rounds.
_ROOM: Final = {8: linear.MULTIPROCESSORS, 4: 56 * 4, 2: 2 * linear.MULTIPROCESSORS}
_product = scaled_matmul.implementations["fused"]


@lru_cache
def form(heads: int, columns: int, tokens: int, size: int) -> ClusterForm:
    """For a kernel of so many tokens and numbers of `size` bytes: all heads at once, two blocks to a multiprocessor."""
    cluster = next((blocks for blocks, most in _ROOM.items() if heads * blocks <= most), 1)
    turns, blocks = _TILES // cluster, columns // linear.COLUMNS
    floats = blocks * tokens + tokens * _PITCH + turns * blocks
    fixed = blocks * tokens * linear.COLUMNS + turns * tokens * _PITCH * size + 4 * floats + _BARRIERS
    stages = linear.ring(fixed, beside=2)
    return ClusterForm(cluster, turns, stages, stages * linear.TILE_BYTES + fixed)


def _refuse(x: QTensor, weight: QTensor, heads: int, eps: float, turn: Rotation, dtype: torch.dtype) -> str | None:
    (rows, columns), why = weight.shape, _product.accepts(x, weight, dtype)
    if why is None and rows != heads * HEAD:
        return f"{rows} rows for {heads} heads: wanted {HEAD} for each"
    if why is None and linear.form(rows, columns).segments > 1:
        return f"{columns} columns are summed up in segments"
    return why or refuse_eights(HEAD, turn)


@scaled_matmul_q_norm_rope.impl("fused", accepts=_refuse)
def _scaled_matmul_q_norm_rope(
    x: QTensor, weight: QTensor, heads: int, eps: float, turn: Rotation, dtype: torch.dtype
) -> Tensor:
    tokens, columns = x.shape
    if tokens > linear.FEW:
        return norm_heads(_product.run(x, weight, dtype).view(tokens, heads, HEAD), eps, turn)
    y = torch.empty(tokens, heads, HEAD, dtype=dtype, device=x.device)
    need(weight.data, "weight", device=x.device, align=16)
    need(weight.scale, "weight scale", device=x.device)
    need(x.data, "x", shape=(tokens, columns), device=x.device, align=16)
    need(x.scale, "x scale", device=x.device)
    dims = need_turn(turn, tokens, x.device)
    if tokens:
        launch(x, weight, y, eps, turn, dims)
    return y


def launch(x: QTensor, weight: QTensor, y: Tensor, eps: float, turn: Rotation, dims: int) -> None:
    """y [T, heads, 512] of x [T, K] and weight [heads * 512, K], for 1 to 32 tokens."""
    (tokens, heads, _), columns = y.shape, weight.shape[1]
    wide = next(t for t in linear.TOKENS if t >= tokens)
    chosen = form(heads, columns, wide, y.element_size())
    tiles = tensor_map(weight.data, linear.TILE_ROWS, linear.COLUMNS)
    given = (tiles, weight.scale, x.data, x.scale, y, columns // linear.COLUMNS, tokens, chosen.stages)
    grid = heads * chosen.cluster
    _KERNELS[y.dtype, wide](
        grid, linear.THREADS, *given, eps, *turn, dims, smem=chosen.smem, cluster=chosen.cluster, pdl=True
    )
