"""Where one step reads and writes in the caches: the same in every layer of one layout, so computed once a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsv4.cache.layout import LayerLayout
from dsv4.ops.attention import window_positions
from dsv4.ops.compress import block_tokens
from dsv4.ops.index import KEY_BLOCK
from dsv4.ops.rope import Rotation


@dataclass(frozen=True)
class Closing:
    """Blocks of one ratio that a step completes, B of them."""

    slots: Tensor  # [B]
    ends: Tensor  # [B] position of each block's last token
    turn: Rotation  # of each block's first position


class Places:
    """Rows of a `LayerStore`, each computed when first asked for. T tokens; -1 stands for no row.

    table: [slots, n] pages of every slot.
    """

    def __init__(
        self,
        layout: LayerLayout,
        table: Tensor,
        slots: Tensor,
        positions: Tensor,
        longest: int,
        closing: Closing | None,
    ) -> None:
        self.layout, self.table, self.slots, self.positions = layout, table, slots, positions
        self.longest, self.closing = longest, closing

    def prepare(self) -> None:
        """Compute now what more than one branch of a layer reads (`model/beside.py`): none may wait for another's."""
        _ = self.write, self.window
        if self.layout.ratio:
            _ = self.own_key, self.visible

    @cached_property
    def write(self) -> Tensor:
        """Rows of `kv` for the step's own window vectors, [T]."""
        return self.layout.window_rows(self.slots, self.positions)

    @cached_property
    def window(self) -> Tensor:
        """Rows of `kv` that each token's window covers, oldest first, [T, span]."""
        seen = window_positions(self.positions, self.layout.span)
        return torch.where(seen < 0, -1, self.layout.window_rows(self.slots.unsqueeze(1), seen))

    @cached_property
    def tail(self) -> Tensor:
        """Rows of `tail` and `key_tail` for the step's own terms, [T]."""
        return self.layout.tail_rows(self.slots, self.positions)

    @cached_property
    def visible(self) -> Tensor:
        """How many entries each token may see, [T]: a block that ends at a token is visible to it."""
        return (self.positions + 1) // self.layout.ratio

    @cached_property
    def every(self) -> Tensor:
        """Every visible entry, ascending, [T, n]."""
        numbers = torch.arange(self.longest // self.layout.ratio, device=self.slots.device)
        return torch.where(numbers < self.visible.unsqueeze(1), numbers, -1)

    @cached_property
    def every_row(self) -> Tensor:
        """Rows of `kv` of `every`, [T, n]."""
        return self.rows(self.every)

    def rows(self, entries: Tensor) -> Tensor:
        """Rows of `kv` of chosen entries, [T, n]."""
        return torch.where(entries < 0, -1, self.layout.entry_rows(self._pages(entries), entries))

    def key_rows(self, entries: Tensor) -> Tensor:
        """Rows of `keys` of chosen entries, [T, n]."""
        return torch.where(entries < 0, -1, self.layout.key_rows(self._pages(entries), entries))

    def _pages(self, entries: Tensor) -> Tensor:
        return self.table[self.slots.unsqueeze(1), entries // self.layout.entries]

    @cached_property
    def every_key(self) -> Tensor:
        """Rows of `keys` of `every`, [T, n]."""
        return self.key_rows(self.every)

    @cached_property
    def own_key(self) -> Tensor:
        """Row of `keys` of the entry to which each token belongs, [T]."""
        return self.key_rows((self.positions // self.layout.ratio).unsqueeze(1)).squeeze(1)

    @property
    def width(self) -> int:
        """Entries to score: those of the longest context, in whole blocks."""
        return -(-(self.longest // self.layout.ratio) // KEY_BLOCK) * KEY_BLOCK

    @cached_property
    def keys(self) -> Tensor:
        """Rows of `keys` to score, [T, n], n a multiple of 64; those past a token's visible ones are not looked at."""
        numbers = torch.arange(self.width, device=self.slots.device)
        pages = (numbers // self.layout.entries).clamp(max=self.table.shape[1] - 1)
        return self.layout.key_rows(self.table[self.slots.unsqueeze(1), pages], numbers)

    @cached_property
    def closed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Blocks that end here: their tokens' positions and rows of `tail`, [B, n]; rows of `kv` and of `keys`, [B]."""
        assert self.closing is not None
        slots, ratio = self.closing.slots, self.layout.ratio
        tokens, entries = block_tokens(self.closing.ends, ratio), self.closing.ends // ratio
        pages = self.table[slots, entries // self.layout.entries]
        return (
            tokens,
            self.layout.tail_rows(slots.unsqueeze(1), tokens),
            self.layout.entry_rows(pages, entries),
            self.layout.key_rows(pages, entries),
        )
