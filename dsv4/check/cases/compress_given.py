"""What compressors are given in the cases: tokens of sequences, their terms, and rings with those that came before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.check.cases.inputs import INF, NAN, norm_weight, normal, padded
from dsv4.check.cases.kv import page_bytes, pattern
from dsv4.check.cases.norm import EPS
from dsv4.check.contract import Arguments
from dsv4.ops.compress import Ring, StepTokens
from dsv4.ops.rope import frequencies, rotation
from dsv4.quant.index_keys import DIMS, KeyLayout

SLOTS = 4  # at least
FAR = 2**31  # what an int cannot hold


class Run(NamedTuple):
    """Consecutive tokens of one sequence. slot -1: nobody's. stored: whether blocks that end have a row."""

    slot: int
    start: int
    tokens: int
    stored: bool = True


def rings(ratio: int) -> int:
    """A usual length: what a block needs, and eight more."""
    return (2 * ratio if ratio == 4 else ratio) + 8


def given_kv(
    ratio: int,
    runs: Sequence[Run],
    length: int,
    *,
    settled: bool = False,
    dims: int = 512,
    rotated: int = 64,
    page: int = 64,
    between: int = 0,
    beside: int = 0,
    far: bool = False,
) -> Arguments:
    """page: rows of one. between: bytes between two of them. far: the last is 2^31 bytes behind the first."""
    step = _step(ratio, runs, length, settled, dims, rotated, beside)
    return _with_pages(step, ratio, runs, page, page_bytes(page, dims, rotated), between, far)


def given_keys(
    layout: KeyLayout,
    spread: bool,
    ratio: int,
    runs: Sequence[Run],
    length: int,
    *,
    settled: bool = False,
    page: int = 64,
    between: int = 0,
    beside: int = 0,
    far: bool = False,
) -> Arguments:
    """The same of index keys."""
    step = _step(ratio, runs, length, settled, DIMS, 64, beside)
    return *_with_pages(step, ratio, runs, page, layout.page_bytes(page), between, far), layout, spread


def _with_pages(
    step: Arguments, ratio: int, runs: Sequence[Run], page: int, size: int, between: int, far: bool
) -> Arguments:
    """Arguments 0 to 8. page and size: rows and bytes of one."""
    tokens = step[5]
    count = FAR // size + 2 if far else -(-max(2, 4 * _blocks(tokens, ratio)) // page)
    tokens = tokens._replace(rows=_rows(tokens, ratio, count * page, runs))
    pages = pattern(count, size)
    if between:
        wide = pages.new_zeros(count, size + between)
        wide[:, :size] = pages
        pages = wide[:, :size]
    return (*step[:5], tokens, *step[6:], pages)


def _step(
    ratio: int, runs: Sequence[Run], length: int, settled: bool, dims: int, rotated: int, beside: int
) -> Arguments:
    """Arguments 0 to 7. settled: the ring holds already what the tokens will leave there, else NaN but in what they
    may read."""
    width = dims * (2 if ratio == 4 else 1)
    slots, positions = _places(runs)
    ape = normal("ape", ratio, 2, width, size=0.5)
    ape[:, 0] = 0.0
    period = length // ratio * ratio if settled else 1009
    assert not settled or period == length, "terms repeat with the ring"
    pool = normal("terms", 997, 2 * width, size=2.0)

    def terms(slots: Tensor, positions: Tensor) -> Tensor:
        return pool[(slots * 31 + positions % period) % len(pool)]

    projected = terms(slots, positions)
    held = max(SLOTS, 1 + max((run.slot for run in runs), default=0))
    ring = torch.full((held * length, 2, width), NAN)
    for run in (Run(slot, length, 0) for slot in range(held)) if settled else runs:
        if run.slot >= 0:
            back = length if settled else min(run.start, 2 * ratio - 1 if ratio == 4 else ratio - 1)
            older = torch.arange(run.start - back, run.start)
            own = torch.full_like(older, run.slot)
            ring[own * length + older % length] = terms(own, older).view(-1, 2, width) + ape[older % ratio]
    turn = rotation(positions // ratio * ratio, frequencies(rotated, 160000.0, 16.0, 65536))
    most = max((run.tokens for run in runs), default=1)
    if beside:
        projected = padded(projected, beside)
    tokens = StepTokens(slots, positions, positions)
    return projected, ape, norm_weight(dims), EPS, turn, tokens, Ring(ring, length), most


def _places(runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    """Slots and positions."""
    none = torch.zeros(0, dtype=torch.int64)
    slots = [torch.full((run.tokens,), run.slot) for run in runs]
    positions = [torch.arange(run.start, run.start + run.tokens) for run in runs]
    return torch.cat([none, *slots]), torch.cat([none, *positions])


def _blocks(tokens: StepTokens, ratio: int) -> int:
    """Of the step, the unfinished ones too."""
    return len(torch.stack((tokens.slots, tokens.positions // ratio)).unique(dim=1).T)


def _rows(tokens: StepTokens, ratio: int, total: int, runs: Sequence[Run]) -> Tensor:
    """A row for each block, all over the pages, the last one among them; every token has that of its block."""
    named = torch.stack((tokens.slots, tokens.positions // ratio))
    number = named.unique(dim=1, return_inverse=True)[1] if len(tokens.slots) else tokens.slots
    count = int(number.max()) + 1 if len(number) else 1
    rows = total - 1 - number * (total // count)
    unstored = [torch.full((run.tokens,), not run.stored) for run in runs]
    return rows.masked_fill(torch.cat([torch.zeros(0, dtype=torch.bool), *unstored]), -1)


def odd(make: Callable[..., Arguments], ratio: int) -> Arguments:
    """Tokens that end blocks of seven sequences: a NaN and infinities among values and scores, in the ring and here,
    scores of very different size, zeros, and an ordinary one between them."""
    given = make([Run(n, 2 * ratio - 1, 1) for n in range(9)], rings(ratio))
    projected, ring = given[0], given[6]
    width = projected.shape[1] // 2
    at = [n * ring.length + (2 * ratio - 2) % ring.length for n in range(9)]
    projected[0, width - 1] = NAN  # a value
    projected[1, 2 * width - 40] = NAN  # a score, of a turned number
    projected[2, width - 300] = INF
    projected[3, 2 * width - 200] = -INF  # no weight
    ring.terms[at[4], 1, width - 77] = INF
    ring.terms[at[5], 0, width - 78] = -INF
    projected[6, width:] = projected[6, width:] * 1e4
    projected[7] = 0.0
    ring.terms[7 * ring.length : 8 * ring.length] *= 0.0
    return given
