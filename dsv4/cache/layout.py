"""How many rows of what each layer keeps, and where: from the configuration alone. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from dsv4.config import EngineOptions, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

OVERLAPPED = 4
PAGE = 128  # tokens a page: whole entries of every ratio that was released


@dataclass(frozen=True)
class LayerLayout:
    """Rows of one layer: rings of each sequence, then pages that sequences share.

    Position p of a ring of n rows lies in row p mod n. `window` and `tail` are rings long enough that a chunk can be
    written before it is read, and that the last `EngineOptions.draft_slack` tokens (or one chunk, if that is more) can
    be taken back. Compressed entry e of a sequence lies in page e // entries of its row in the table of pages.
    """

    ratio: int  # 0: window alone
    span: int  # positions that a token sees in the window, its own included
    window: int  # rows of the window ring
    block: int  # positions whose terms an entry is pooled from
    tail: int  # rows of the compressor's ring
    width: int  # head_dim
    tail_width: int  # channels of values (and of scores) in a row of the tail
    key_width: int  # index_head_dim where there is an indexer, else 0
    key_tail_width: int
    slots: int  # sequences at once
    pages: int
    entries: int  # compressed rows a page

    @property
    def rows(self) -> int:
        """Rows of `kv`: the window rings of all slots, then the pages."""
        return self.slots * self.window + self.pages * self.entries

    def window_rows(self, slots: Tensor | int, positions: Tensor) -> Tensor:
        """Rows of `kv` that hold the window vectors of these positions. Shapes broadcast, here and below."""
        return slots * self.window + positions % self.window

    def entry_rows(self, pages: Tensor | int, entries: Tensor) -> Tensor:
        """Rows of `kv` that hold these compressed entries, of which each lies in the page given for it."""
        return self.slots * self.window + self.key_rows(pages, entries)

    def key_rows(self, pages: Tensor | int, entries: Tensor) -> Tensor:
        """Rows of `keys` of these entries."""
        return pages * self.entries + entries % self.entries

    def tail_rows(self, slots: Tensor | int, positions: Tensor) -> Tensor:
        """Rows of `tail` and `key_tail` of these positions."""
        return slots * self.tail + positions % self.tail

    @property
    def indexed(self) -> bool:
        """Whether an indexer selects among the compressed rows."""
        return self.key_width > 0

    def state(self) -> tuple[int, int]:
        """Numbers kept of one sequence to go on from it (window, page it is in; compressor tails): of either dtype."""
        return self.span * self.width + self.entries * (self.width + self.key_width), self.block * self.terms

    @property
    def terms(self) -> int:
        """FP32 numbers of a token in the compressors' rings."""
        return 2 * (self.tail_width + self.key_tail_width)


def reach(options: EngineOptions) -> int:
    """The longest run of tokens that is written at once (a chunk, or a token and its draft); all can be taken back."""
    return max(min(options.prefill_chunk, options.max_context), 1 + options.draft_slack)


def page_tokens(config: ModelConfig) -> int:
    """Tokens of a page: whole entries in every layer."""
    return math.lcm(PAGE, *filter(None, config.layer_ratios))


def table_width(config: ModelConfig, options: EngineOptions) -> int:
    """Pages of the longest sequence."""
    return -(-options.max_context // page_tokens(config))


def page_count(config: ModelConfig, options: EngineOptions) -> int:
    """Pages for `options.cache_tokens`; without, as many as every slot can fill."""
    if options.cache_tokens is None:
        return options.max_sequences * table_width(config, options)
    return -(-options.cache_tokens // page_tokens(config))


def layer_layout(config: ModelConfig, options: EngineOptions, ratio: int) -> LayerLayout:
    """The layout of a layer with this compression ratio."""
    overlapped = ratio == OVERLAPPED
    halves, block = (2, 2 * ratio) if overlapped else (1, ratio)
    key_width = config.index_head_dim if overlapped else 0
    return LayerLayout(
        ratio=ratio,
        span=config.sliding_window,
        window=config.sliding_window + reach(options),
        block=block,
        tail=block + reach(options) if ratio else 0,
        width=config.head_dim,
        tail_width=halves * config.head_dim if ratio else 0,
        key_width=key_width,
        key_tail_width=2 * key_width,
        slots=options.max_sequences,
        pages=page_count(config, options) if ratio else 0,
        entries=page_tokens(config) // ratio if ratio else 0,
    )


def layouts(config: ModelConfig, options: EngineOptions) -> tuple[LayerLayout, ...]:
    """One layout a layer: the main layers, then the draft's (window alone, and room to run ahead of what it saw)."""
    main = tuple(layer_layout(config, options, ratio) for ratio in config.layer_ratios)
    draft = layer_layout(config, options, 0)
    draft = replace(draft, window=draft.window + options.draft_slack)
    return main + (draft,) * config.draft_layers


class CacheBytes(NamedTuple):
    """Bytes of rings (windows and tails of all slots), of pages (compressed rows, index keys), and of states kept."""

    rings: int
    pages: int
    kept: int


def cache_parts(config: ModelConfig, options: EngineOptions) -> CacheBytes:
    """What `Store` allocates for `options.max_sequences` sequences, all pages and `options.reuse_points`."""
    layers = [_layer_bytes(one, config, options) for one in layouts(config, options)]
    return CacheBytes(*map(sum, zip(*layers, strict=True)))


def _layer_bytes(layout: LayerLayout, config: ModelConfig, options: EngineOptions) -> CacheBytes:
    if options.stored:
        from dsv4.cache.stored import stored_bytes  # whose formats load torch

        return stored_bytes(layout, options.reuse_points, config.qk_rope_head_dim)
    size = {"bfloat16": 2, "float32": 4}[options.dtype]
    pages = layout.pages * layout.entries * (layout.width + layout.key_width)
    rings, terms = layout.slots * layout.window * layout.width, layout.slots * layout.tail * layout.terms
    state, state_terms = layout.state()
    return CacheBytes(rings * size + terms * 4, pages * size, options.reuse_points * (state * size + state_terms * 4))


def cache_bytes(config: ModelConfig, options: EngineOptions) -> int:
    """Bytes of all of it."""
    return sum(cache_parts(config, options))
