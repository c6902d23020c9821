"""Compressors on a GPU: terms into their ring, and the blocks that end into their caches."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.heads import need_turn
from dsv4.kernels.kv import refuse_pages
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.rows import need_vector
from dsv4.ops.compress import OVERLAPPED, Ring, StepTokens, compress_keys, compress_kv
from dsv4.ops.rope import Rotation
from dsv4.quant.index_keys import DIMS, KEY_LAYOUTS, KeyLayout
from dsv4.quant.kv_rows import KvRow
from dsv4.quant.paged import Layout

FEW: Final = 512  # tokens up to which one launch writes the ring too, a block of threads a token
_STEP: Final = "p l p p p p i i p i"  # as in csrc/compress.cu
_FINISH: Final = "p f p p i"
_KV: Final = {
    ratio: Kernel("compress.cu", f"compress_kv_{ratio}", _STEP + _FINISH + "p l i i i") for ratio in (OVERLAPPED, 128)
}
_KEYS: Final = {
    layout: Kernel("compress.cu", f"compress_keys_{layout.name}", _STEP + _FINISH + "p l i i i i")
    for layout in KEY_LAYOUTS.values()
}
_KEEP: Final = Kernel("compress.cu", "compress_keep", _STEP + "i i")
_KV_DIMS: Final = 512
_TURNED: Final = 64
_MANY: Final = {OVERLAPPED: 4, 128: 32}  # tokens of a block of threads, where there are more than a few
_KEEPERS: Final = 256  # threads
_KEPT: Final = 8  # tokens of them


def _refuse(projected: Tensor, ape: Tensor, turn: Rotation, ring: Ring, dims: int) -> str | None:
    ratio = ape.shape[0]
    if not projected.is_cuda:
        return f"projected is on {projected.device}"
    if ratio not in _MANY:
        return f"blocks of {ratio} tokens; kernels pool {' or '.join(map(str, _MANY))}"
    if turn.cos.shape[-1] != _TURNED:
        return f"{turn.cos.shape[-1]} dimensions are rotated, and {_TURNED} fit"
    width = 2 * dims * (2 if ratio == OVERLAPPED else 1)
    if projected.shape[1] != width:
        return f"projected is {projected.shape[1]} wide; at ratio {ratio} entries of {dims} have {width}"
    if projected.stride(1) != 1 or projected.stride(0) % 4:
        return f"projected has stride {list(projected.stride())}: rows have to begin at multiples of 16 bytes"
    span = 2 * ratio if ratio == OVERLAPPED else ratio
    return None if ring.length >= span - 1 else f"a ring of {ring.length}, and a block needs the {span - 1} before"


def _refuse_kv(
    projected: Tensor,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    turn: Rotation,
    tokens: StepTokens,
    ring: Ring,
    most: int,
    pages: Tensor,
) -> str | None:
    refused = _refuse(projected, ape, turn, ring, _KV_DIMS) or refuse_pages(pages, _KV_DIMS, _TURNED)
    return refused or _refuse_stride(pages)


@compress_kv.impl("fused", accepts=_refuse_kv)
def _compress_kv(
    projected: Tensor,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    turn: Rotation,
    tokens: StepTokens,
    ring: Ring,
    most: int,
    pages: Tensor,
) -> None:
    places = _places(pages, KvRow(_KV_DIMS, _TURNED), projected.device)
    _run(_KV[ape.shape[0]], _KV_DIMS, projected, ape, norm, eps, turn, tokens, ring, most, places)


def _refuse_keys(
    projected: Tensor,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    turn: Rotation,
    tokens: StepTokens,
    ring: Ring,
    most: int,
    pages: Tensor,
    layout: KeyLayout,
    spread: bool = True,
) -> str | None:
    if ape.shape[0] != OVERLAPPED:
        return f"index keys of blocks of {ape.shape[0]} tokens; kernels pool {OVERLAPPED}"
    if not layout.page_rows(pages.shape[1]):
        return f"a page has {pages.shape[1]} bytes and holds no key"
    return _refuse(projected, ape, turn, ring, DIMS) or _refuse_stride(pages)


@compress_keys.impl("fused", accepts=_refuse_keys)
def _compress_keys(
    projected: Tensor,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    turn: Rotation,
    tokens: StepTokens,
    ring: Ring,
    most: int,
    pages: Tensor,
    layout: KeyLayout,
    spread: bool = True,
) -> None:
    places = *_places(pages, layout, projected.device), int(spread)
    _run(_KEYS[layout], DIMS, projected, ape, norm, eps, turn, tokens, ring, most, places)


def _refuse_stride(pages: Tensor) -> str | None:
    if pages.stride(1) != 1 or pages.stride(0) % 8:
        return f"pages have stride {list(pages.stride())}: they have to begin at multiples of 8 bytes"
    return None


def _places(pages: Tensor, layout: Layout, device: torch.device) -> tuple[Tensor | int, ...]:
    """`Pages` of csrc/common/kv_rows.cuh."""
    need(pages, "pages", shape=(None, None), dtype=torch.uint8, device=device, contiguous=False, align=16)
    size = pages.shape[1]
    return pages, pages.stride(0), layout.page_rows(size), *layout.sizes


def _run(
    kernel: Kernel,
    dims: int,
    projected: Tensor,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    turn: Rotation,
    tokens: StepTokens,
    ring: Ring,
    most: int,
    places: tuple[Tensor | int, ...],
) -> None:
    """In one launch where no place of the ring that it writes is one that it may read, and the tokens are few."""
    (count, width), device, ratio = projected.shape, projected.device, ape.shape[0]
    need(projected, "projected", dtype=torch.float32, contiguous=False, align=16)
    need(ape, "ape", shape=(ratio, 2, width // 2), dtype=torch.float32, device=device, align=16)
    need(ring.terms, "ring.terms", shape=(None, 2, width // 2), dtype=torch.float32, device=device, align=16)
    for name, part in zip(tokens._fields, tokens, strict=True):
        need(part, f"tokens.{name}", shape=(count,), dtype=torch.int64, device=device)
    need_vector(norm, "norm", dims, device)
    need_turn(turn, count, device)
    halves, runs = (2, 1) if ratio == OVERLAPPED else (1, 4)
    once = count <= FEW and ring.length >= halves * ratio - 1 + min(most, count)
    each = 1 if count <= FEW else _MANY[ratio]

    def step(each: int) -> tuple[Tensor | int, ...]:
        return projected, projected.stride(0), ape, *tokens, count, each, *ring

    finish = (norm, eps, *turn, int(once))
    kernel(-(-count // each), dims // 4 * runs, *step(each), *finish, *places, pdl=True)
    if not once:
        _KEEP(-(-count // _KEPT), _KEEPERS, *step(_KEPT), ratio, width // 2, pdl=True)
