"""One layer's cache in the bytes that kernels read: rows of `KvRow`, index keys of `KeyLayout`, terms in FP32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from dsv4.cache.layout import CacheBytes, LayerLayout
from dsv4.cache.live import LiveRows
from dsv4.cache.paged import Paged
from dsv4.quant.index_keys import FP4_KEYS, KeyLayout
from dsv4.quant.kv_rows import KvRow

NEAR_PAGE: Final = 64  # rows of a page of windows


def stored_bytes(layout: LayerLayout, points: int, rope_dims: int, key_layout: KeyLayout = FP4_KEYS) -> CacheBytes:
    """Bytes that a `StoredLayer` allocates."""
    row = KvRow(layout.width, rope_dims)
    key = sum(key_layout.sizes) if layout.indexed else 0
    rings = -(-layout.slots * layout.window // NEAR_PAGE) * row.page_bytes(NEAR_PAGE)
    rings += layout.slots * layout.tail * layout.terms * 4
    pages = layout.pages * row.page_bytes(layout.entries) if layout.ratio else 0
    if layout.indexed:
        pages += layout.pages * key_layout.page_bytes(layout.entries)
    wide = sum(row.sizes)
    point = layout.span * wide + layout.entries * (wide + key) + layout.block * layout.terms * 4
    return CacheBytes(rings, pages, points * point)


class StoredLayer:
    """As `LayerStore`, for all slots and pages, and the states kept of it.

    near: the window rings of all slots, rows of `LayerLayout.window_rows`. far: compressed rows, numbered as
    `LayerLayout.key_rows` does, like `keys`; without compression `near` again.
    """

    def __init__(
        self, layout: LayerLayout, table: Tensor, points: int, rope_dims: int, key_layout: KeyLayout = FP4_KEYS
    ) -> None:
        self.layout, self.table = layout, table
        device, row = table.device, KvRow(layout.width, rope_dims)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.near = Paged(row, -(-layout.slots * layout.window // NEAR_PAGE), NEAR_PAGE, device)
        self.far = Paged(row, layout.pages, layout.entries, device) if layout.ratio else self.near
        self.keys = Paged(key_layout, layout.pages, layout.entries, device) if layout.indexed else None
        tails = (2, layout.tail_width), (2, layout.key_tail_width)
        self.tail, self.key_tail = (zeros(layout.slots * layout.tail, *shape) for shape in tails)
        counts = (layout.span, self.near.width), (layout.entries, self.far.width)
        self._kept_near, self._kept_far = (zeros(points, *shape, dtype=torch.uint8) for shape in counts)
        self._kept_keys = zeros(points, layout.entries, self.keys.width if self.keys else 0, dtype=torch.uint8)
        self._kept_tail, self._kept_key_tail = (zeros(points, layout.block, *shape) for shape in tails)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        paged = (self.near, self.far if self.layout.ratio else None, self.keys)
        kept = self._kept_near, self._kept_far, self._kept_keys, self._kept_tail, self._kept_key_tail
        return [*(one.pages for one in paged if one), self.tail, self.key_tail, *kept]

    def copies(self, rows: LiveRows) -> Iterator[tuple[Tensor | Paged[Any], Tensor, Tensor]]:
        """What a state is made of: where it lies, the rows that the next token may read, where they are kept."""
        yield self.near, rows.window, self._kept_near
        if self.layout.ratio:
            yield self.far, rows.keys, self._kept_far
            yield self.tail, rows.tail, self._kept_tail
        if self.keys:
            yield self.keys, rows.keys, self._kept_keys
            yield self.key_tail, rows.tail, self._kept_key_tail
