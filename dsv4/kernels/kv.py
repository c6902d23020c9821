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
_USUALLY: Final = Kernel("kv.cu", "write_kv_usual", "p i i p f p p p i i p")
_READ: Final = Kernel("kv.cu", "read_kv", _PAGES + "i i i p")
_USUAL: Final = KvRow(512, 64)
_MOST: Final = 2**26  # tokens of the quick form, and numbers between two of them
_WARPS: Final = 4  # of a block


def _pages(pages: Tensor, rows: Tensor, layout: KvRow, tokens: int) -> tuple[Tensor | int, ...]:
    """The arguments of _PAGES."""
    need(pages, "pages", shape=(None, None), dtype=torch.uint8, device=rows.device, align=16)
    need(rows, "rows", shape=(tokens,), dtype=torch.int64)
    size = pages.shape[1]
    return pages, size, layout.page_rows(size), *layout.sizes, rows


def refuse_pages(pages: Tensor, dims: int, rope_dims: int) -> str | None:
    """Why kernels cannot take these pages of rows, or None."""
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
    return refused or refuse_pages(pages, kv.shape[1], turn.cos.shape[-1])


@write_kv.impl("fused", accepts=_refuse_write)
def _write_kv(kv: Tensor, weight: Tensor, eps: float, turn: Rotation, pages: Tensor, rows: Tensor) -> None:
    tokens, n = kv.shape
    need_vector(weight, "weight", n, kv.device)
    dims = need_turn(turn, tokens, kv.device)
    layout = KvRow(n, dims)
    places = _pages(pages, rows, layout, tokens)
    if _is_usual(kv, weight, turn, layout, pages):
        shift = layout.page_rows(pages.shape[1]).bit_length() - 1
        given = (kv, kv.stride(0), tokens, weight, eps, turn.cos, turn.sin)
        _USUALLY(-(-tokens // _WARPS), 32 * _WARPS, *given, pages, pages.shape[1], shift, rows, pdl=True)
        return
    kernel = _WRITE[kv.dtype, Heads.of(kv).chunks]
    source = (kv, kv.stride(0), tokens, n, weight, eps, turn.cos, turn.sin, dims)
    kernel(-(-tokens // _WARPS), 32 * _WARPS, *source, *places, pdl=True)


def _is_usual(kv: Tensor, weight: Tensor, turn: Rotation, layout: KvRow, pages: Tensor) -> bool:
    """Whether it is what models have, which the quick form takes."""
    count = layout.page_rows(pages.shape[1])
    return (
        layout == _USUAL
        and kv.dtype == torch.bfloat16
        and kv.stride(0) % 8 == 0
        and max(len(kv), kv.stride(0)) < _MOST
        and count & (count - 1) == 0
        and pages.shape[1] < 2**31
        and all(x.data_ptr() % 16 == 0 for x in (kv, weight, *turn))
    )


def _refuse_read(pages: Tensor, rows: Tensor, dims: int, rope_dims: int) -> str | None:
    if dims % 8 or rope_dims % 8 or not 0 < rope_dims <= dims:
        return f"{rope_dims} of {dims} dimensions are rotated: both have to be multiples of 8"
    return refuse_pages(pages, dims, rope_dims)


@read_kv.impl("fused", accepts=_refuse_read)
def _read_kv(pages: Tensor, rows: Tensor, dims: int, rope_dims: int) -> Tensor:
    tokens = len(rows)
    y = torch.empty(tokens, dims, dtype=torch.bfloat16, device=pages.device)
    places = _pages(pages, rows, KvRow(dims, rope_dims), tokens)
    _READ(-(-tokens // _WARPS), 32 * _WARPS, *places, tokens, dims, rope_dims, y, pdl=True)
    return y
