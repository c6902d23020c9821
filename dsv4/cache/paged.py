"""Rows of bytes in pages, read and written by their numbers as those of a tensor are."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

from dsv4.quant import paged

Layout = TypeVar("Layout", bound=paged.Layout)


class Paged(Generic[Layout]):
    """Pages of one layout."""

    def __init__(self, layout: Layout, pages: int, rows: int, device: torch.device) -> None:
        """`rows` a page."""
        self.layout = layout
        self.pages = torch.zeros(pages, layout.page_bytes(rows), dtype=torch.uint8, device=device)

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return sum(self.layout.sizes)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 [n, width] of rows [n], numbers before scales."""
        return torch.cat(paged.read_rows(self.layout, self.pages, rows), 1)

    def __setitem__(self, rows: Tensor, values: Tensor) -> None:
        paged.write_rows(self.layout, self.pages, rows, *values.split(self.layout.sizes, 1))
