"""A dense and a stored matrix that share an input, on Hopper: one launch for few tokens, with the bits of two."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels import linear, matmul
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.linear_wide import CLUSTERS
from dsv4.kernels.tiles import tensor_map
from dsv4.ops.linear import Products, scaled_matmul, shared_input
from dsv4.quant.tensor import QTensor

_ROWS: Final = (16, 8)  # of a dense tile
_MOST_TOKENS: Final = 8
_THREADS: Final = 288
_KERNELS: Final = {
    r: Kernel("linear_mixed.cu", f"linear_mixed_{r}", "m p p p p i i i m p l p i i i i i") for r in _ROWS
}
_product = scaled_matmul.implementations["fused"]


class Plan(NamedTuple):
    """Rows of a dense tile, blocks for each matrix, and how the stored one lies on its own."""

    rows: int
    dense: int
    form: linear.Form


@lru_cache
def plan(dense: int, stored: int, columns: int) -> Plan:
    """For so many rows of each: shares of two blocks a multiprocessor, so that none has more bytes than it must.

    All blocks are in clusters, those of the dense matrix too, and more than find room at once end late.
    """
    own = linear.form(stored, columns)
    places = 2 * own.segments * CLUSTERS[own.segments]
    tiles, tile_bytes = stored // linear.TILE_ROWS, linear.TILE_ROWS * columns // own.segments

    def cost(turns: int, rows: int) -> tuple[int, Plan]:
        clusters, dense_tiles = -(-tiles // turns), -(-dense // rows)
        blocks = min(dense_tiles, places - own.segments * clusters)
        most = max(turns * tile_bytes, -(-dense_tiles // blocks) * rows * columns * 2)
        return most, Plan(rows, -(-blocks // own.segments) * own.segments, linear.Form(own.segments, clusters, turns))

    given = [(turns, rows) for turns in range(own.turns, 2 * own.turns + 4) for rows in _ROWS]
    return min((cost(*one) for one in given), key=lambda pair: pair[0])[1]


def _refuse(x: Tensor, rows: QTensor, dense: Tensor, stored: QTensor) -> str | None:
    return matmul.refuse_product(x, dense) or _product.accepts(rows, stored, x.dtype)


@shared_input.impl("fused", accepts=_refuse)
def _shared_input(x: Tensor, rows: QTensor, dense: Tensor, stored: QTensor) -> Products:
    (tokens, columns), height, stored_height = x.shape, dense.shape[0], stored.shape[0]
    machine = matmul.machine_of(x.device)
    chosen = plan(height, stored_height, columns)
    few = matmul.few(chosen.rows, height, columns, max(tokens, 1), machine)
    if not 0 < tokens <= _MOST_TOKENS or few is None or not matmul.on_tensor_cores(x, dense):
        return Products(matmul.product(x, dense), _product.run(rows, stored, x.dtype))
    found = Products(
        torch.empty(tokens, height, device=x.device),
        torch.empty(tokens, stored_height, dtype=x.dtype, device=x.device),
    )
    need(dense, "dense", shape=(height, columns), device=x.device, align=16)
    need(stored.data, "stored", shape=(stored_height, columns), device=x.device, align=16)
    need(rows.data, "rows", shape=(tokens, columns), device=x.device, align=16)
    form, x = chosen.form, matmul.aligned(x)
    stages, smem = linear.memory(form, columns, _MOST_TOKENS)
    blocks = form.segments * form.clusters
    eight = (tensor_map(stored.data, linear.TILE_ROWS, 128), stored.scale, rows.data, rows.scale, found.stored)
    sizes = (stored_height // linear.TILE_ROWS, columns // 128, stages)
    sixteen = (tensor_map(dense, chosen.rows, 128), x, x.stride(0), found.dense, height, columns, few.stages)
    _KERNELS[chosen.rows](
        blocks + chosen.dense,
        _THREADS,
        *(*eight, *sizes, *sixteen, tokens, blocks),
        smem=max(smem, few.smem),
        cluster=form.segments,
        pdl=True,
    )
    return found
