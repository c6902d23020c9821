"""A dense and a stored matrix that share an input, on Hopper: one launch for few tokens, with the bits of two."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels import linear, matmul
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.tiles import tensor_map
from dsv4.ops.linear import Products, scaled_matmul, shared_input
from dsv4.quant.tensor import QTensor

_ROWS: Final = 16  # of a dense tile
_TURNS: Final = 2  # tiles of a cluster of the stored matrix
_MOST_TOKENS: Final = 8
_THREADS: Final = 288
_KERNEL: Final = Kernel("linear_mixed.cu", "linear_mixed", "m p p p p i i i m p l p i i i i i")
_product = scaled_matmul.implementations["fused"]


class Plan(NamedTuple):
    """Blocks of the dense matrix, and how the stored one lies on its own."""

    dense: int
    form: linear.Form


@lru_cache
def plan(dense: int, stored: int, columns: int) -> Plan:
    """For so many rows of each, two blocks a multiprocessor: by bench/linear_mixed.py."""
    own, tiles = linear.form(stored, columns), stored // linear.TILE_ROWS
    turns = max(own.turns, min(_TURNS, tiles))
    form = linear.Form(own.segments, -(-tiles // turns), turns)
    wanted = -(-dense // (_ROWS * form.segments)) * form.segments  # all blocks of a launch lie in clusters
    room = 2 * linear.MULTIPROCESSORS - form.segments * form.clusters
    return Plan(max(form.segments, min(wanted, room // form.segments * form.segments)), form)


def _refuse(x: Tensor, rows: QTensor, dense: Tensor, stored: QTensor) -> str | None:
    return matmul.refuse_product(x, dense) or _product.accepts(rows, stored, x.dtype)


@shared_input.impl("fused", accepts=_refuse)
def _shared_input(x: Tensor, rows: QTensor, dense: Tensor, stored: QTensor) -> Products:
    (tokens, columns), height, stored_height = x.shape, dense.shape[0], stored.shape[0]
    machine = matmul.machine_of(x.device)
    chosen = plan(height, stored_height, columns)
    few = matmul.few(_ROWS, height, columns, max(tokens, 1), machine)
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
    sixteen = (tensor_map(dense, _ROWS, 128), x, x.stride(0), found.dense, height, columns, few.stages)
    _KERNEL(
        blocks + chosen.dense,
        _THREADS,
        *(*eight, *sizes, *sixteen, tokens, blocks),
        smem=max(smem, few.smem),
        cluster=form.segments,
        pdl=True,
    )
    return found
