"""Rows of bytes in pages: a page of m rows is m times numbers, then m times scales; row n stands in page n // m."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """What `KvRow` and `KeyLayout` say of a row."""

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of its numbers, and of its scales."""

    def page_bytes(self, rows: int) -> int:
        """Of a page of so many rows, with its pad."""

    def page_rows(self, page_bytes: int) -> int:
        """Rows of a page of so many bytes."""


def spans(layout: Layout, pages: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Page, first byte of the numbers and first byte of the scales inside the page, each [T]; rows: [T] int64."""
    count, (numbers, scales) = layout.page_rows(pages.shape[1]), layout.sizes
    page, slot = rows // count, rows % count
    return page, slot * numbers, count * numbers + slot * scales


def read_rows(layout: Layout, pages: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (numbers, scales), a row each, of rows [T]."""
    numbers, scales = pages[_places(layout, pages, rows)].split(layout.sizes, 1)
    return numbers, scales


def write_rows(layout: Layout, pages: Tensor, rows: Tensor, numbers: Tensor, scales: Tensor) -> None:
    """Into rows [T], all different. Mutates `pages`."""
    pages[_places(layout, pages, rows)] = torch.cat((numbers, scales), 1)


def _places(layout: Layout, pages: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Page and byte of every byte of the rows, numbers before scales."""
    page, *firsts = spans(layout, pages, rows)
    each = zip(firsts, layout.sizes, strict=True)
    places = [first.unsqueeze(1) + torch.arange(size, device=rows.device) for first, size in each]
    return page.unsqueeze(1), torch.cat(places, 1)
