"""Attention over stored rows on a GPU: how a token's heads and entries lie on blocks. No choice here changes a bit."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels import rows
from dsv4.kernels.heads import need_turn
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.rows import need_vector, stored_rows
from dsv4.ops.attention import attend, attend_quant
from dsv4.ops.rope import Rotation
from dsv4.quant.formats import FP8_ROW
from dsv4.quant.kv_rows import KvRow
from dsv4.quant.tensor import QTensor

# As csrc/common/attend.cuh has them.
_ROW: Final = KvRow(512, 64)
_THREADS: Final = 512
_CHUNK: Final = 64  # entries
_STRANDS: Final = 32
_PITCH: Final = 520 * 4  # bytes from head to head of values
_MOST_HEADS: Final = 1024
_KERNELS: Final = {16 * m: Kernel("attend.cu", f"attend_{m}", "p p l i p i p l i p i p p p i i p p p") for m in (1, 2)}
_WHOLE: Final = 227 << 10  # bytes of shared memory for a block
_NEIGHBOURS: Final = 16  # multiprocessors that a cluster lies on
# What a block's time is made of, in units of a chunk of 16 heads, as its bytes of shared memory were counted.
_START: Final = 2.0
_COST: Final = {16: 1.0, 32: 1.6}  # of a chunk
_MERGE: Final = {16: 0.7, 32: 1.3}


class Plan(NamedTuple):
    """heads: of a tile, 16 or 32. blocks: of a cluster. slots: strands that a block keeps, 2 at most."""

    heads: int
    blocks: int
    slots: int

    @property
    def smem(self) -> int:
        """Bytes: `Memory` of the kernel, and the first of two strands."""
        tiles = self.heads * 128
        raw, wide = 3 * (_CHUNK // 2) * (_ROW.row_bytes + _ROW.scale_bytes), 2 * _CHUNK * 1024
        queries = (1 if self.heads == 16 else 4) * tiles
        beside = 8 * _CHUNK // 2 * 16 + 16 * 4 + self.heads * (64 + 16) + 16
        return raw + wide + tiles + queries + beside + (self.slots - 1) * self.heads * _PITCH


def plan(tokens: int, heads: int, entries: int, processors: int) -> Plan:
    """The form that should be over first, on so many multiprocessors."""
    chunks = -(-entries // _CHUNK)
    strands = min(chunks, _STRANDS)
    spread = {blocks for blocks in (strands, -(-strands // 2)) if 1 < blocks <= _NEIGHBOURS}
    forms = [Plan(tile, blocks, -(-strands // blocks)) for tile in _COST for blocks in sorted(spread)]
    forms = [form for form in forms if form.smem <= _WHOLE]
    if chunks <= _STRANDS:
        forms += [Plan(tile, 1, 1) for tile in _COST]
    return min(forms, key=lambda form: _time(form, tokens, heads, chunks, processors))


def _time(form: Plan, tokens: int, heads: int, chunks: int, processors: int) -> float:
    at_once = processors if form.blocks == 1 else processors // _NEIGHBOURS * (_NEIGHBOURS // form.blocks)
    rounds = -(-tokens * -(-heads // form.heads) // max(1, at_once))
    alone = _START + -(-chunks // form.blocks) * _COST[form.heads]
    return rounds * (alone + (_MERGE[form.heads] if form.blocks > 1 else 0.0))


def _refuse(
    q: Tensor, near: Tensor, near_rows: Tensor, far: Tensor, far_rows: Tensor, sink: Tensor, turn: Rotation
) -> str | None:
    if not q.is_cuda:
        return f"q is on {q.device}"
    if q.dtype != torch.bfloat16:
        return f"q is {str(q.dtype).removeprefix('torch.')}"
    if (q.shape[2], turn.cos.shape[-1]) != _ROW:
        return f"{turn.cos.shape[-1]} of {q.shape[2]} dimensions are rotated, and 64 of 512 fit"
    if not 0 < q.shape[1] <= _MOST_HEADS:
        return f"{q.shape[1]} heads, and 1 to {_MOST_HEADS} fit"
    for pages in (near, far):
        if pages.shape[1] % 16 or not _ROW.page_rows(pages.shape[1]):
            return f"a page has {pages.shape[1]} bytes, no multiple of 16 that holds a row"
    return None if near_rows.shape[1] else "no list has an entry"


@attend.impl("fused", accepts=_refuse)
def _attend(
    q: Tensor, near: Tensor, near_rows: Tensor, far: Tensor, far_rows: Tensor, sink: Tensor, turn: Rotation
) -> Tensor:
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _run(q, ((near, near_rows), (far, far_rows)), sink, turn, y, None, None)
    return y


@attend_quant.impl("fused", accepts=_refuse)
def _attend_quant(
    q: Tensor, near: Tensor, near_rows: Tensor, far: Tensor, far_rows: Tensor, sink: Tensor, turn: Rotation
) -> QTensor:
    stored, (data, scale, *_) = stored_rows(len(q), q.shape[1] * q.shape[2], FP8_ROW, None, q.device)
    _run(q, ((near, near_rows), (far, far_rows)), sink, turn, None, data, scale)
    return stored


def _run(
    q: Tensor, lists: tuple[tuple[Tensor, Tensor], ...], sink: Tensor, turn: Rotation, *out: Tensor | None
) -> None:
    (tokens, heads, dims), device = q.shape, q.device
    need(q, "q", shape=(tokens, heads, dims), dtype=torch.bfloat16, align=16)
    need_vector(sink, "sink", heads, device)
    need_turn(turn, tokens, device)
    for name, part in zip(turn._fields, turn, strict=True):
        need(part, f"turn.{name}", align=16)
    places: list[Tensor | int] = []
    for pages, listed in lists:
        need(pages, "pages", shape=(None, None), dtype=torch.uint8, device=device, align=16)
        need(listed, "rows", shape=(tokens, None), dtype=torch.int64, device=device)
        places += [pages, pages.shape[1], _ROW.page_rows(pages.shape[1]), listed, listed.shape[1]]
    entries = sum(listed.shape[1] for _, listed in lists)
    form = plan(tokens, heads, entries, rows.multiprocessors(device))
    tiles = -(-heads // form.heads)
    grid, given = tokens * tiles * form.blocks, (q, *places, sink, *turn, heads, tiles, *out)
    _KERNELS[form.heads](grid, _THREADS, *given, smem=form.smem, cluster=form.blocks, pdl=True)
