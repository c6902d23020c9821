"""What follows from the positions of a step's tokens: how they turn, and which rows of the caches are theirs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops.attention import window_positions
from dsv4.ops.index import entry_rows
from dsv4.ops.op import op
from dsv4.ops.rope import Rotation, rotation


class WindowRows(NamedTuple):
    """Rows of the window rings, int64; -1 for none."""

    write: Tensor  # [T] of each token itself
    seen: Tensor  # [T, span] of the positions that it sees, oldest first


class BlockRows(NamedTuple):
    """Compressed entries of one ratio, and the rows of pages in which they lie, int64; -1 for none."""

    visible: Tensor  # [T] entries that a token may see: a block that ends at it is visible to it
    own: Tensor  # [T] row of the entry to which a token belongs
    rows: Tensor  # [T, n] rows of the entries 0 .. n - 1, as far as they are visible


@op
def rotations(positions: Tensor, steps: Tensor, every: Tensor) -> tuple[Rotation, ...]:
    """Rotations of the tokens by n tables: `rotation` for every table.

    positions: [T] int64; steps: [n, R / 2] FP32 of `frequencies`; every: [n] int64, at least 1. By table i a token is
    turned as the first position of its block of every[i] is: 1 for its own.
    """
    firsts = torch.div(positions, every.unsqueeze(1), rounding_mode="floor") * every.unsqueeze(1)
    return tuple(rotation(first, table) for first, table in zip(firsts, steps, strict=True))


@op
def window_rows(slots: Tensor, positions: Tensor, ring: int, span: int) -> WindowRows:
    """Where tokens write their window vectors, and where those lie that they see.

    slots, positions: [T] int64. Position p of sequence s lies in row s * ring + p mod ring.
    """
    seen = window_positions(positions, span)
    rows = slots.unsqueeze(1) * ring + seen % ring
    return WindowRows(slots * ring + positions % ring, rows.masked_fill(seen < 0, -1))


@op
def block_rows(slots: Tensor, positions: Tensor, table: Tensor, ratio: int, page: int, count: int) -> BlockRows:
    """What tokens may see of the compressed entries, and where the first `count` of these lie.

    slots, positions: [T] int64; table: [S, P] pages of each sequence, `page` entries each, int64. Entry e is of the
    positions e * ratio and `ratio` - 1 more.
    """
    visible = (positions + 1) // ratio
    numbers = torch.arange(count, device=positions.device)
    listed = torch.where(numbers < visible.unsqueeze(1), numbers, -1)
    own = entry_rows((positions // ratio).unsqueeze(1), table, slots, page).squeeze(1)
    return BlockRows(visible, own, entry_rows(listed, table, slots, page))
