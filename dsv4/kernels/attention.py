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

# As csrc/common/attend_tile.cuh has them.
_ROW: Final = KvRow(512, 64)
_THREADS: Final = 512
_CHUNK: Final = 64  # entries
_STRANDS: Final = 32
_SLOTS: Final = 2
_RINGS: Final = ((3, 3), (3, 2), (2, 3), (2, 2))
_WIDE_RINGS: Final = (
    (4, 1),
    (3, 1),
    (3, 0),
)  # of rows that are BF16 already: only their second number is room for values
_PITCH: Final = 264 * 4  # bytes from head to head of a block's values
_TILES: Final = (16, 32, 64)  # heads
_MOST_HEADS: Final = 1024
_KERNEL: Final = Kernel("attend.cu", "attend_tiles", "p p l i p i p l i p i p p p i i i i i i p p p")
_WIDE: Final = Kernel("attend.cu", "attend_wide", "p p p i p p i p p p i i i i i i p p p")
_WHOLE: Final = 227 << 10  # bytes of shared memory for a block
# Multiprocessors that a cluster lies on; of so many clusters there is room at once (eight took two rounds on an H100).
_NEIGHBOURS: Final = 16
_PLACES: Final = 7
# What a tile's time is made of, in units of a chunk of a stream: fitted to bench/results/2026-11-28-attend-forms.jsonl.
_START: Final = 0.5
_MERGE: Final = {16: 1.35, 32: 1.65, 64: 2.75}  # of strands on several pairs, by the tile's heads
_CLOSE: Final = 0.3  # of it where a pair has all strands


class Plan(NamedTuple):
    """heads: of a tile. pairs: of blocks in a cluster. slots: strands that a stream keeps.

    stages, ring: chunks in shared memory, as BF16 and as they are stored.
    """

    heads: int
    pairs: int
    slots: int
    stages: int
    ring: int

    @property
    def smem(self) -> int:
        """Bytes: `Memory` of the kernel, and what is behind it."""
        beside, queries = 7168, 64 * 512
        return beside + queries + self._rings + self.heads * 512 + (self.slots - 1) * self._strands

    @property
    def _rings(self) -> int:
        return self.stages * _CHUNK * 512 + self.ring * _CHUNK * 320

    @property
    def _strands(self) -> int:
        """Of one strand of each of a block's streams."""
        return 2 * self.heads * _PITCH

    @property
    def fits(self) -> bool:
        """The last strands take the place of the rings."""
        return self.smem <= _WHOLE and self._strands <= self._rings and self.slots <= _SLOTS


def form(tile: int, pairs: int, chunks: int, wide: bool = False) -> Plan | None:
    """With the rings that shared memory has room for; None: it has none for this. wide: rows are BF16 already.

    A pair that has all strands folds each behind those before it: they take the room of a second strand, and none where
    strands have one chunk each.
    """
    slots = -(-min(chunks, _STRANDS) // (2 * pairs)) if pairs > 1 else 1 + (chunks > _STRANDS)
    made = [Plan(tile, pairs, slots, *rings) for rings in (_WIDE_RINGS if wide else _RINGS)]
    return next((one for one in made if one.fits), None)


def plan(tokens: int, heads: int, entries: int, processors: int, wide: bool = False) -> Plan:
    """The form that should be over first, on so many multiprocessors."""
    chunks = -(-entries // _CHUNK)
    spread = {-(-min(chunks, _STRANDS) // (2 * slots)) for slots in range(1, _SLOTS + 1)}
    shapes = [1, *(pairs for pairs in sorted(spread) if 1 < pairs <= _NEIGHBOURS // 2)]
    forms = [one for tile in _TILES for pairs in shapes if (one := form(tile, pairs, chunks, wide))]
    return min(forms, key=lambda one: _time(one, tokens, heads, chunks, processors))


def _time(one: Plan, tokens: int, heads: int, chunks: int, processors: int) -> float:
    at_once = processors // 2 if one.pairs == 1 else _PLACES * (_NEIGHBOURS // (2 * one.pairs))
    rounds = -(-tokens * -(-heads // one.heads) // max(1, at_once))
    merge = _MERGE[one.heads] * (1.0 if one.pairs > 1 else _CLOSE)
    return rounds * (_START + -(-chunks // (2 * one.pairs)) + merge)


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
    if near.dtype != far.dtype:
        return f"rows of both {near.dtype} and {far.dtype}"
    for pages in (near, far) if near.dtype == torch.uint8 else ():
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
    wide = lists[0][0].dtype == torch.bfloat16
    for pages, listed in lists:
        need(listed, "rows", shape=(tokens, None), dtype=torch.int64, device=device)
        if wide:
            need(pages, "rows", shape=(None, dims), dtype=torch.bfloat16, device=device, align=16)
            places += [pages, listed, listed.shape[1]]
        else:
            need(pages, "pages", shape=(None, None), dtype=torch.uint8, device=device, align=16)
            places += [pages, pages.shape[1], _ROW.page_rows(pages.shape[1]), listed, listed.shape[1]]
    entries = sum(listed.shape[1] for _, listed in lists)
    one = plan(tokens, heads, entries, rows.multiprocessors(device), wide)
    tiles, blocks = -(-heads // one.heads), 2 * one.pairs
    given = (q, *places, sink, *turn, heads, tiles, one.heads, one.slots, one.stages, one.ring, *out)
    kernel = _WIDE if wide else _KERNEL
    kernel(tokens * tiles * blocks, _THREADS, *given, smem=one.smem, cluster=blocks, pdl=True)
