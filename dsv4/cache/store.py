"""The tensors behind the layout, addressed by sequence slot, page and position.

Everything is either a ring addressed by position or a row of a page addressed by block number, and nothing is read that
was not written for the position it is read for. So a new sequence needs no clearing, and taking tokens back sets a
number.

A sequence can be gone on from where its state was kept (`keep`, `restore`): rings belong to one slot, so what the next
token needs of them is copied, and so is the page that is not full yet, because its owner goes on writing to it. Full
pages are not copied: whoever goes on from there has them in its table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.cache.layout import LayerLayout, layouts, page_count, page_tokens, reach, table_width
from dsv4.cache.live import LiveRows
from dsv4.cache.paged import Paged
from dsv4.cache.stored import StoredLayer
from dsv4.cache.transfer import sent
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import RequestError


class LayerStore:
    """One layer's tensors for all slots and pages, and the states kept of it.

    table: int64 [slots, n] the pages of each slot, in order.
    """

    def __init__(self, layout: LayerLayout, table: Tensor, points: int, dtype: torch.dtype) -> None:
        self.layout, self.table = layout, table
        device = table.device

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        tails = (2, layout.tail_width), (2, layout.key_tail_width)
        self.kv = zeros(dtype, layout.rows, layout.width)
        self.keys = zeros(dtype, layout.pages * layout.entries, layout.key_width)
        self.tail, self.key_tail = (zeros(torch.float32, layout.slots * layout.tail, *shape) for shape in tails)
        self.kept_kv = zeros(dtype, points, layout.span + layout.entries, layout.width)
        self.kept_keys = zeros(dtype, points, layout.entries, layout.key_width)
        self.kept_tail, self.kept_key_tail = (zeros(torch.float32, points, layout.block, *shape) for shape in tails)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        live = [self.kv, self.keys, self.tail, self.key_tail]
        return [*live, self.kept_kv, self.kept_keys, self.kept_tail, self.kept_key_tail]

    def copies(self, rows: LiveRows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What a state is made of: a tensor, the rows of it that the next token may read, where they are kept."""
        yield self.kv, torch.cat((rows.window, rows.entries)), self.kept_kv
        if self.layout.ratio:
            yield self.tail, rows.tail, self.kept_tail
        if self.layout.indexed:
            yield self.keys, rows.keys, self.kept_keys
            yield self.key_tail, rows.tail, self.kept_key_tail


AnyLayer = LayerStore | StoredLayer


class Store:
    """The cache of `options.max_sequences` sequences, and how far each has come.

    Without `assign`, slot n has the n-th run of pages, as far as there are any.
    """

    def __init__(self, config: ModelConfig, options: EngineOptions, points: int = 0) -> None:
        """`points`: states that can be kept."""
        width, self.page, self.points = table_width(config, options), page_tokens(config), points
        self.page_count = page_count(config, options)
        own = torch.arange(options.max_sequences * width, device=options.device).view(-1, width)
        self.table = own.masked_fill(own >= self.page_count, 0)  # what was never assigned is read, and not looked at
        self.layers = [self._layer(layout, config, options) for layout in layouts(config, options)]
        self.capacity = options.max_context
        self.reach = reach(options)
        self.pages: list[list[int]] = [[n for n in run if n < self.page_count] for run in own.tolist()]
        self.lengths = [0] * options.max_sequences
        self._begun = [0] * options.max_sequences
        self._written = [0] * options.max_sequences

    def _layer(self, layout: LayerLayout, config: ModelConfig, options: EngineOptions) -> AnyLayer:
        if options.stored:
            return StoredLayer(layout, self.table, self.points, config.qk_rope_head_dim)
        return LayerStore(layout, self.table, self.points, getattr(torch, options.dtype))

    def reset(self, slot: int, length: int = 0) -> None:
        """Begin a new sequence in this slot, whose first `length` tokens come from `restore`."""
        self.lengths[slot] = self._written[slot] = self._begun[slot] = length

    def assign(self, slot: int, pages: Sequence[int]) -> None:
        """Say which pages a slot has."""
        if self.pages[slot] != pages:
            self.pages[slot] = list(pages)
            self.table[slot, : len(pages)] = sent(torch.tensor(self.pages[slot]), self.table.device)

    def keep(self, point: int, slot: int, length: int) -> None:
        """Copy what a token at position `length` of this slot needs beside full pages; at most `reach` tokens back."""
        assert 0 < length <= self.lengths[slot]
        assert self._written[slot] - length <= self.reach
        for tensor, rows, kept in self._copies(slot, length):
            kept[point, : len(rows)] = tensor[rows]

    def restore(self, point: int, slot: int, length: int) -> None:
        """Copy back what was kept of a sequence of this length, into a slot that has its pages."""
        for tensor, rows, kept in self._copies(slot, length):
            tensor[rows] = kept[point, : len(rows)]

    def _copies(self, slot: int, length: int) -> Iterator[tuple[Tensor | Paged[Any], Tensor, Tensor]]:
        page = self.pages[slot][length // self.page] if length % self.page else None
        known: dict[LayerLayout, LiveRows] = {}
        for layer in self.layers:
            if layer.layout not in known:
                known[layer.layout] = LiveRows(layer.layout, slot, length, page, self.table.device)
            yield from layer.copies(known[layer.layout])

    def advance(self, slot: int, tokens: int) -> None:
        """Count tokens whose state has been written."""
        assert 0 <= tokens <= self.reach
        assert self.lengths[slot] + tokens <= min(self.capacity, len(self.pages[slot]) * self.page)
        self.lengths[slot] += tokens
        self._written[slot] = max(self._written[slot], self.lengths[slot])

    def mark(self, slot: int) -> int:
        """A point to come back to: the number of tokens so far."""
        return self.lengths[slot]

    def rewind(self, slot: int, mark: int) -> None:
        """Forget every token after `mark`. RequestError if more were written since than the rings still hold."""
        if not self._begun[slot] <= mark <= self.lengths[slot] or self._written[slot] - mark > self.reach:
            raise RequestError(
                "cannot rewind that far",
                got=f"position {mark} of {self._written[slot]}",
                wanted=f"at most {self.reach} tokens back",
                do="raise draft_slack",
            )
        self.lengths[slot] = mark
