"""What a sequence may still read of one layer's cache: the rows that have to be kept to go on from there."""

from __future__ import annotations

import torch

from dsv4.cache.layout import LayerLayout


class LiveRows:
    """Rows of one layout that a sequence of `length` tokens in `slot` may still read, pages that are full left out.

    Of a sequence shorter than a window or a block there are rows of no position among them, which nobody reads.
    """

    def __init__(self, layout: LayerLayout, slot: int, length: int, page: int | None, device: torch.device) -> None:
        """`page`: the one that is not full, if there is one."""
        positions = torch.arange(length - max(layout.span, layout.block), length, device=device)
        self.window = layout.window_rows(slot, positions[-layout.span :])
        self.tail = layout.tail_rows(slot, positions[-layout.block :]) if layout.ratio else positions[:0]
        entries = torch.arange(0 if page is None else layout.entries, device=device)
        self.entries = self.keys = entries
        if len(entries) and page is not None:
            self.entries, self.keys = layout.entry_rows(page, entries), layout.key_rows(page, entries)
