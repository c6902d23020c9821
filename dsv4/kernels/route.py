"""The router on a GPU: its product, and behind it scores, choice and weights. Two launches, or for few tokens one."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.matmul import aligned, machine_of, on_tensor_cores, product, refuse_product
from dsv4.kernels.mhc_accepts import largest_cluster
from dsv4.kernels.rows import need_vector
from dsv4.kernels.tiles import tensor_map
from dsv4.ops.moe import Route, route

_WARPS: Final = 4  # of a block, a token each
_LANES: Final = 32  # that hold the choices, and as many experts at a time
_SIZES: Final = (8, 12, 16)  # experts of a lane
_KERNELS: Final = {m: Kernel("route.cu", f"route_{m}", "p p p f p p i i i") for m in _SIZES}

# As csrc/route_cluster.cu has them.
_ROWS: Final = 16  # experts of a block
_MOST_ROWS: Final = 256
_TOKENS: Final = 8
_THREADS: Final = 256
_HEAD: Final = 4096  # bytes
_RESERVED: Final = 1 << 10  # by the driver
_SLICE: Final = 256  # columns
_MOST_COLUMNS: Final = 24 * _SLICE
_CLUSTER: Final = Kernel("route_cluster.cu", "route_cluster", "m p l p p f p p i i i i")


def _refuse(x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> str | None:
    experts = gate.shape[0]
    if not 0 < k <= min(_LANES, experts) or experts > _LANES * _SIZES[-1]:
        return f"{k} of {experts} experts: wanted 1 to {_LANES} of at most {_LANES * _SIZES[-1]}"
    return refuse_product(x, gate)


def _refuse_cluster(
    x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float
) -> str | None:
    (tokens, columns), experts = x.shape, gate.shape[0]
    if why := _refuse(x, gate, bias, chosen, k, scale):
        return why
    if not on_tensor_cores(x, gate):
        return f"x is {str(x.dtype).removeprefix('torch.')} of {columns} columns, and the gate {gate.dtype}"
    if not 0 < tokens <= _TOKENS:
        return f"{tokens} tokens, and 1 to {_TOKENS} fit"
    if experts > _MOST_ROWS or columns > _MOST_COLUMNS:
        return f"a gate of {experts} x {columns}, and {_MOST_ROWS} x {_MOST_COLUMNS} fits into a cluster"
    size, most = cluster_size(tokens, experts), largest_cluster(x.device)
    nbytes, room = memory(tokens, columns), machine_of(x.device).shared - _RESERVED
    return None if size <= most and nbytes <= room else f"{size} blocks of {nbytes} bytes, and {most} of {room} fit"


def cluster_size(tokens: int, experts: int) -> int:
    """Blocks: for all experts, and for all tokens. Two at least, since memcheck refuses stores within one."""
    return max(2, tokens, -(-experts // _ROWS))


def memory(tokens: int, columns: int) -> int:
    """Bytes of a block: its rows of the gate, the tokens, and a sum of each row and token for each slice."""
    slices, boxes = -(-columns // _SLICE), -(-columns // 64)
    return _HEAD + slices * _ROWS * (2 * _SLICE + 4 * _TOKENS) + boxes * tokens * 128


@route.impl("fused", accepts=_refuse)
def _route(x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> Route:
    tokens, count = x.shape[0], gate.shape[0]
    _need(x, count, bias, chosen, k)
    logits = product(x, gate)
    made = _made(x, k)
    kernel = _KERNELS[next(m for m in _SIZES if _LANES * m >= count)]
    kernel(-(-tokens // _WARPS), 128, logits, bias, chosen, scale, *made, tokens, count, k, pdl=True)
    return made


@route.impl("cluster", accepts=_refuse_cluster)
def _route_cluster(x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> Route:
    (tokens, columns), count = x.shape, gate.shape[0]
    _need(x, count, bias, chosen, k)
    need(gate, "gate", shape=(count, columns), device=x.device, align=16)
    x, made, size = aligned(x), _made(x, k), cluster_size(tokens, count)
    given = (tensor_map(gate, _ROWS, 128), x, x.stride(0), bias, chosen, scale, *made)
    smem = memory(tokens, columns)
    _CLUSTER(size, _THREADS, *given, tokens, count, k, columns, smem=smem, cluster=size, pdl=True)
    return made


def _need(x: Tensor, count: int, bias: Tensor | None, chosen: Tensor | None, k: int) -> None:
    if bias is not None:
        need_vector(bias, "bias", count, x.device)
    if chosen is not None:
        need(chosen, "chosen", shape=(len(x), k), dtype=torch.int64, device=x.device)


def _made(x: Tensor, k: int) -> Route:
    """Room for experts and weights."""
    return Route(torch.empty(len(x), k, dtype=torch.int64, device=x.device), torch.empty(len(x), k, device=x.device))
