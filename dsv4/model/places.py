"""Where one step reads and writes in the caches: the same in every layer of one layout, so computed once a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsv4.cache.layout import LayerLayout
from dsv4.ops.compress import block_tokens
from dsv4.ops.index import KEY_BLOCK
from dsv4.ops.rope import Rotation
from dsv4.ops.step import BlockRows, WindowRows, block_rows


@dataclass(frozen=True)
class Closing:
    """Blocks of one ratio that a step completes, B of them."""

    slots: Tensor  # [B]
    ends: Tensor  # [B] position of each block's last token
    turn: Rotation  # of each block's first position


class Places:
    """Rows of a `LayerStore` or a `StoredLayer`, each computed when first asked for. T tokens; -1 stands for no row.

    table: [slots, n] pages of every slot; near: rows of the windows, which layers of one ring share.
    """

    def __init__(
        self,
        layout: LayerLayout,
        table: Tensor,
        slots: Tensor,
        positions: Tensor,
        longest: int,
        near: WindowRows,
        closing: Closing | None,
    ) -> None:
        self.layout, self.table, self.slots, self.positions = layout, table, slots, positions
        self.longest, self.closing = longest, closing
        self.write, self.window = near  # rows of the tokens themselves, [T], and of those that they see, [T, span]
        self._blocks: dict[int, BlockRows] = {}

    def blocks(self, count: int) -> BlockRows:
        """What each token may see, and rows of `keys` or of stored entries: of its own entry, and of the first few."""
        if count not in self._blocks:
            pages = self.table, self.layout.ratio, self.layout.entries
            self._blocks[count] = block_rows(self.slots, self.positions, *pages, count)
        return self._blocks[count]

    @property
    def most(self) -> int:
        """Entries that a token of the longest context may see."""
        return self.longest // self.layout.ratio

    @cached_property
    def tail(self) -> Tensor:
        """Rows of `tail` and `key_tail` for the step's own terms, [T]."""
        return self.layout.tail_rows(self.slots, self.positions)

    @cached_property
    def every(self) -> Tensor:
        """Every visible entry, ascending, [T, n]."""
        numbers = torch.arange(self.most, device=self.slots.device)
        return torch.where(numbers < self.blocks(0).visible.unsqueeze(1), numbers, -1)

    @cached_property
    def every_row(self) -> Tensor:
        """Rows of `kv` of `every`, [T, n]."""
        return self.rows(self.every)

    def rows(self, entries: Tensor) -> Tensor:
        """Rows of `kv` of chosen entries, [T, n]."""
        pages = self.table[self.slots.unsqueeze(1), entries // self.layout.entries]
        return torch.where(entries < 0, -1, self.layout.entry_rows(pages, entries))

    @property
    def width(self) -> int:
        """Entries to score: those of the longest context, in whole blocks."""
        return -(-self.most // KEY_BLOCK) * KEY_BLOCK

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
