"""The rows that a step's tokens see, decoded once for all of them instead of by each.

It pays for a prompt, whose tokens see much the same rows. What is attended to are then BF16 rows of a pool in place of
the cache's stored ones: those of the windows of all runs of tokens, and those of the pages that hold their entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.cache.layout import LayerLayout
from dsv4.cache.stored import StoredLayer
from dsv4.cache.transfer import sent
from dsv4.ops.attention import window_positions
from dsv4.ops.kv import read_kv
from dsv4.ops.step import block_rows

PAYS: Final = 4  # rows that tokens list, for each that is decoded


class Run(NamedTuple):
    """Consecutive tokens of one sequence: positions start .. end - 1 of `slot`."""

    slot: int
    start: int
    end: int

    def first(self, span: int) -> int:
        """The oldest position that one of them sees in its window."""
        return max(0, self.start - span + 1)


class Pool:
    """What to decode, and where each token finds what it sees. T tokens; -1 stands for no row."""

    def __init__(
        self, runs: Sequence[Run], layout: LayerLayout, table: Tensor, slots: Tensor, positions: Tensor
    ) -> None:
        """table: [slots, n] pages of every slot; slots, positions: [T]."""
        self._runs, self._layout, self._table, self._slots, self._positions = runs, layout, table, slots, positions
        self._firsts = [run.first(layout.span) for run in runs]
        self._counts = [run.end - first for run, first in zip(runs, self._firsts, strict=True)]  # rows of windows
        self._blocks: dict[int, Tensor] = {}

    def decoded(self, store: StoredLayer, dims: int, rope_dims: int) -> tuple[Tensor, Tensor]:
        """The rows themselves, BF16 [N, D]: of the windows, and of the pages."""
        near = read_kv(store.near.pages, self._near, dims, rope_dims)
        far = read_kv(store.far.pages, self._far[0], dims, rope_dims) if self._layout.ratio else near[:0]
        return near, far

    @cached_property
    def _near(self) -> Tensor:
        """Rows of the window rings, one run after another."""
        positions = torch.cat(
            [torch.arange(first, run.end) for first, run in zip(self._firsts, self._runs, strict=True)]
        )
        slots = _repeated([run.slot for run in self._runs], self._counts)
        return self._layout.window_rows(*sent(torch.stack((slots, positions)), self._table.device))

    @cached_property
    def seen(self) -> Tensor:
        """Which of them each token sees, oldest first, [T, span]."""
        bases = accumulate(self._counts, initial=0)
        shifts = [base - first for base, first in zip(bases, self._firsts, strict=False)]
        shift = sent(_repeated(shifts, [run.end - run.start for run in self._runs]), self._table.device)
        seen = window_positions(self._positions, self._layout.span)
        return (seen + shift.unsqueeze(1)).masked_fill(seen < 0, -1)

    @cached_property
    def _far(self) -> tuple[Tensor, Tensor]:
        """Rows of the pages that hold entries of the runs, and [slots, n] which of these pages are whose."""
        layout = self._layout
        counts = [pages_of(run, layout) for run in self._runs]
        slots = _repeated([run.slot for run in self._runs], counts)
        numbers = torch.cat([torch.arange(count) for count in counts])
        slots, numbers = sent(torch.stack((slots, numbers)), self._table.device)
        rows = self._table[slots, numbers].unsqueeze(1) * layout.entries
        own = torch.zeros_like(self._table)
        own[slots, numbers] = torch.arange(len(slots), device=own.device)
        return (rows + torch.arange(layout.entries, device=own.device)).flatten(), own

    @property
    def table(self) -> Tensor:
        """Pages of every slot in the pool."""
        return self._far[1]

    def first_rows(self, count: int) -> Tensor:
        """The first entries, as far as a token sees them, [T, count]."""
        if count not in self._blocks:
            pages = self.table, self._layout.ratio, self._layout.entries
            self._blocks[count] = block_rows(self._slots, self._positions, *pages, count).rows
        return self._blocks[count]


def _repeated(values: Sequence[int], counts: Sequence[int]) -> Tensor:
    return torch.tensor(values).repeat_interleave(torch.tensor(counts))


def pages_of(run: Run, layout: LayerLayout) -> int:
    """Pages that hold its entries."""
    return -(-(run.end // layout.ratio) // layout.entries) if layout.ratio else 0


def pool_rows(runs: Sequence[Run], layout: LayerLayout) -> int:
    """Rows that a pool of these runs has."""
    return sum(run.end - run.first(layout.span) + pages_of(run, layout) * layout.entries for run in runs)


def most_rows(runs: Sequence[Run], layout: LayerLayout, listed: int) -> int:
    """Rows up to which a pool pays: the tokens list many times as many. listed: entries of each, beside its window."""
    return sum(run.end - run.start for run in runs) * (layout.span + listed) // PAYS


def pays(runs: Sequence[Run], layout: LayerLayout, listed: int) -> bool:
    """Whether to decode rows once."""
    return 0 < pool_rows(runs, layout) <= most_rows(runs, layout, listed)
