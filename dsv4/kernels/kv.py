"""Keys and values into the bytes of their paged cache and back, on a GPU."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.heads import Heads, need_turn, refuse_eights, refuse_heads
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.rows import NAMES, need_vector
from dsv4.ops.kv import read_kv, write_kv
from dsv4.ops.rope import Rotation
from dsv4.quant.kv_rows import KvRow

_PAGES: Final = "p l i i i p"  # pages, bytes of a page, its rows, bytes of a row and of its scales, which rows
_WRITE: Final = {
    (t, v): Kernel("kv.cu", f"write_kv_{NAMES[t]}_{v}", "p l i i p f p p i" + _PAGES) for t in NAMES for v in (1, 2)
}
_READ: Final = Kernel("kv.cu", "read_kv", _PAGES + "i i i p")
_WARPS: Final = 4  # of a block; a warp for each token


def _pages(pages: Tensor, rows: Tensor, layout: KvRow, tokens: int) -> tuple[Tensor | int, ...]:
    """The arguments of _PAGES."""
    need(pages, "pages", shape=(None, None), dtype=torch.uint8, device=rows.device, align=16)
    need(rows, "rows", shape=(tokens,), dtype=torch.int64)
    size = pages.shape[1]
    return pages, size, layout.page_rows(size), layout.row_bytes, layout.scale_bytes, rows


def _refuse_pages(pages: Tensor, dims: int, rope_dims: int) -> str | None:
    if not pages.is_cuda:
        return f"pages is on {pages.device}"
    layout = KvRow(dims, rope_dims)
    if pages.shape[1] % 8 or not layout.page_rows(pages.shape[1]):
        return f"a page has {pages.shape[1]} bytes, no multiple of 8 that holds a row"
    return None


def _refuse_write(kv: Tensor, weight: Tensor, eps: float, turn: Rotation, pages: Tensor, rows: Tensor) -> str | None:
    if kv.dim() != 2:
        return f"kv has shape {list(kv.shape)}"
    refused = refuse_heads("kv", kv) or refuse_eights(kv.shape[1], turn)
    return refused or _refuse_pages(pages, kv.shape[1], turn.cos.shape[-1])


@write_kv.impl("fused", accepts=_refuse_write)
def _write_kv(kv: Tensor, weight: Tensor, eps: float, turn: Rotation, pages: Tensor, rows: Tensor) -> None:
    tokens, n = kv.shape
    need_vector(weight, "weight", n, kv.device)
    dims = need_turn(turn, tokens, kv.device)
    kernel = _WRITE[kv.dtype, Heads.of(kv).chunks]
    places = _pages(pages, rows, KvRow(n, dims), tokens)
    source = (kv, kv.stride(0), tokens, n, weight, eps, turn.cos, turn.sin, dims)
    kernel(-(-tokens // _WARPS), 32 * _WARPS, *source, *places, pdl=True)


def _refuse_read(pages: Tensor, rows: Tensor, dims: int, rope_dims: int) -> str | None:
    if dims % 8 or rope_dims % 8 or not 0 < rope_dims <= dims:
        return f"{rope_dims} of {dims} dimensions are rotated: both have to be multiples of 8"
    return _refuse_pages(pages, dims, rope_dims)


@read_kv.impl("fused", accepts=_refuse_read)
def _read_kv(pages: Tensor, rows: Tensor, dims: int, rope_dims: int) -> Tensor:
    tokens = len(rows)
    y = torch.empty(tokens, dims, dtype=torch.bfloat16, device=pages.device)
    places = _pages(pages, rows, KvRow(dims, rope_dims), tokens)
    _READ(-(-tokens // _WARPS), 32 * _WARPS, *places, tokens, dims, rope_dims, y, pdl=True)
    return y
