"""Rows of bytes in pages, addressed by their numbers: row n is row n mod m of page n // m, m rows a page."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

from dsv4.quant.index_keys import SCALE_BYTES, KeyLayout
from dsv4.quant.kv_rows import KvRow

Layout = TypeVar("Layout", KvRow, KeyLayout)


class Paged(Generic[Layout]):
    """Pages of one layout. Reading and writing rows moves their bytes, numbers before scales."""

    def __init__(self, layout: Layout, pages: int, rows: int, device: torch.device) -> None:
        """`rows` a page."""
        self.layout: Layout = layout
        self.pages = torch.zeros(pages, layout.page_bytes(rows), dtype=torch.uint8, device=device)
        self.data_bytes = layout.row_bytes if isinstance(layout, KvRow) else layout.data_bytes
        self.scale_bytes = layout.scale_bytes if isinstance(layout, KvRow) else SCALE_BYTES

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return self.data_bytes + self.scale_bytes

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 [n, width] of rows [n]."""
        return self.pages[self._places(rows)]

    def __setitem__(self, rows: Tensor, values: Tensor) -> None:
        self.pages[self._places(rows)] = values

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Page and byte of every byte of the rows."""
        page, data, scales = self.layout.spans(self.pages, rows)
        spans = ((data, self.data_bytes), (scales, self.scale_bytes))
        bytes_ = [first.unsqueeze(1) + torch.arange(count, device=rows.device) for first, count in spans]
        return page.unsqueeze(1), torch.cat(bytes_, 1)
