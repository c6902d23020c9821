"""How many rows of what each layer keeps for one sequence, from the configuration alone. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4.config import EngineOptions, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

OVERLAPPED = 4


@dataclass(frozen=True)
class LayerLayout:
    """Rows per sequence of one layer. Position p of a ring of n rows lives in row p mod n.

    `window` and `tail` are rings long enough that a chunk can be written before it is read, and that the last
    `EngineOptions.draft_slack` tokens (or one chunk, if that is more) can be taken back.
    """

    ratio: int  # 0: window alone
    span: int  # positions that a token sees in the window, its own included
    window: int  # rows of the window ring
    entries: int  # compressed rows
    tail: int  # rows of the compressor's ring
    width: int  # head_dim
    tail_width: int  # channels of values (and of scores) in a row of the tail
    key_width: int  # index_head_dim where there is an indexer, else 0
    key_tail_width: int

    @property
    def stride(self) -> int:
        """Rows of `kv` of one slot: the window ring, then the entries."""
        return self.window + self.entries

    def window_rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows of `kv` that hold the window vectors of these positions. Shapes broadcast, here and below."""
        return slots * self.stride + positions % self.window

    def entry_rows(self, slots: Tensor, entries: Tensor | int) -> Tensor:
        """Rows of `kv` that hold these compressed entries."""
        return slots * self.stride + (self.window + entries)

    def key_rows(self, slots: Tensor, entries: Tensor) -> Tensor:
        """Rows of `keys` of these entries."""
        return slots * self.entries + entries

    def tail_rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows of `tail` and `key_tail` of these positions."""
        return slots * self.tail + positions % self.tail

    @property
    def indexed(self) -> bool:
        """Whether an indexer selects among the compressed rows."""
        return self.key_width > 0

    def values(self) -> tuple[int, int]:
        """Numbers kept per sequence: (of activation dtype, of FP32)."""
        rows = self.window * self.width + self.entries * (self.width + self.key_width)
        return rows, 2 * self.tail * (self.tail_width + self.key_tail_width)


def reach(options: EngineOptions) -> int:
    """The longest run of tokens that is written at once (a chunk, or a token and its draft); all can be taken back."""
    return max(min(options.prefill_chunk, options.max_context), 1 + options.draft_slack)


def layer_layout(config: ModelConfig, options: EngineOptions, ratio: int) -> LayerLayout:
    """The layout of a layer with this compression ratio."""
    overlapped = ratio == OVERLAPPED
    halves, span = (2, 2 * ratio) if overlapped else (1, ratio)
    key_width = config.index_head_dim if overlapped else 0
    return LayerLayout(
        ratio=ratio,
        span=config.sliding_window,
        window=config.sliding_window + reach(options),
        entries=options.max_context // ratio if ratio else 0,
        tail=span + reach(options) if ratio else 0,
        width=config.head_dim,
        tail_width=halves * config.head_dim if ratio else 0,
        key_width=key_width,
        key_tail_width=2 * key_width,
    )


def layouts(config: ModelConfig, options: EngineOptions) -> tuple[LayerLayout, ...]:
    """One layout a layer: the main layers, then the draft's (window alone)."""
    ratios = (*config.layer_ratios, *(0 for _ in range(config.draft_layers)))
    return tuple(layer_layout(config, options, ratio) for ratio in ratios)


def cache_bytes(config: ModelConfig, options: EngineOptions) -> int:
    """Bytes that `Store` allocates for `options.max_sequences` sequences."""
    size = {"bfloat16": 2, "float32": 4}[options.dtype]
    stored, wide = map(sum, zip(*(layout.values() for layout in layouts(config, options)), strict=True))
    return options.max_sequences * (stored * size + wide * 4)
