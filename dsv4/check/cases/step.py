"""What follows from positions: at both ends of a context, beside borders of windows, blocks and pages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from dsv4.check.cases.inputs import MANY
from dsv4.check.cases.rope import LAST
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.rope import Rotation, frequencies
from dsv4.ops.step import BlockRows, WindowRows, block_rows, rotations, window_rows

# The FP32 product is part of the meaning, what it is turned by is not: a unit in the last place of 1, near 0 too.
NEAR: Final[Bounds] = {"f32": Bound("abs", 2.0**-23)}
POSITIONS: Final = (0, 1, 3, 4, 126, 127, 128, 129, 255, 256, 1023, 65_535, 999_983, LAST - 1, LAST)


def cases() -> Iterator[Case]:
    yield from _rotations()
    yield from _windows()
    yield from _blocks()


def _positions(tokens: int) -> Tensor:
    known, more = torch.tensor(POSITIONS), torch.arange(tokens) * 7919 % (LAST + 1)
    return torch.cat((known, more))[:tokens]


def _rotations() -> Iterator[Case]:
    case = partial(
        Case,
        op=rotations,
        tokens=(0,),
        bounds=NEAR,
        oracle=_turned,
        oracle_bounds=NEAR,
        moved=lambda _, y: 2 * sum(int(one.cos.nbytes) for one in y),
    )
    for tokens, dims in ((1, 64), (15, 64), (15, 6), (0, 64), (40, 64)):
        yield case(name=f"{tokens} x {dims}", make=partial(_turns, tokens, dims))
    for tokens in (1, 64, MANY):
        yield case(name=f"model {tokens}", make=partial(_turns, tokens, 64), size="big", bench="model", oracle=None)


def _turns(tokens: int, dims: int) -> Arguments:
    plain, yarn = frequencies(dims, 10000.0), frequencies(dims, 160000.0, 16.0, 65536)
    return _positions(tokens), torch.stack((plain, yarn, yarn, yarn)), torch.tensor([1, 1, 4, 128])


def _turned(given: Arguments, found: Any) -> tuple[Rotation, ...]:
    """By the library of the C language, in FP64, one after another."""
    positions, steps, every = given
    made = []
    for like, row, block in zip(found, steps.cpu(), every.tolist(), strict=True):
        cos, sin = torch.empty_like(like.cos, device="cpu"), torch.empty_like(like.sin, device="cpu")
        for token, position in enumerate(positions.tolist()):
            angles = (torch.tensor(float(position // block * block)) * row).tolist()
            cos[token] = torch.tensor([math.cos(a) for a in angles for _ in range(2)])
            sin[token] = torch.tensor([sign * math.sin(a) for a in angles for sign in (-1, 1)])
        made.append(Rotation(cos.to(like.cos.device), sin.to(like.sin.device)))
    return tuple(made)


def _windows() -> Iterator[Case]:
    case = partial(Case, op=window_rows, tokens=(0, 1), oracle=_ring)
    for tokens, ring, span in ((1, 128, 128), (15, 129, 128), (15, 300, 200), (15, 7, 3), (3, 1, 1), (0, 128, 128)):
        yield case(name=f"{tokens}, {span} of {ring}", make=partial(_places, tokens, ring, span))
    for tokens in (1, 64, MANY):
        make = partial(_places, tokens, 8320, 128)
        yield case(name=f"model {tokens}", make=make, size="big", bench="model", oracle=None)


def _places(tokens: int, *more: int) -> Arguments:
    """Slots in no order, the last one among them."""
    return torch.arange(tokens).mul(5).remainder(tokens or 1), _positions(tokens), *more


def _ring(given: Arguments, found: Any) -> WindowRows:
    slots, positions, ring, span = given
    write, seen = [], []
    for slot, last in zip(slots.tolist(), positions.tolist(), strict=True):
        write.append(slot * ring + last % ring)
        rows = [slot * ring + p % ring for p in range(max(0, last - span + 1), last + 1)]
        seen.append(rows + [-1] * (span - len(rows)))
    made = (torch.tensor(rows, dtype=torch.int64, device=slots.device) for rows in (write, seen))
    return WindowRows(*(one.view(like.shape) for one, like in zip(made, found, strict=True)))


def _blocks() -> Iterator[Case]:
    case = partial(Case, op=block_rows, tokens=(0, 1), oracle=_listed)
    few = (
        (15, 4, 32, 0),
        (15, 4, 32, 200),
        (15, 128, 1, 5),
        (3, 4, 3, 129),
        (15, 2, 7, 128),
        (0, 4, 32, 9),
        (1, 1, 1, 1),
    )
    for tokens, ratio, page, count in few:
        make = partial(_pages, tokens, ratio, page, count)
        yield case(name=f"{tokens}, {count} of {ratio} in pages of {page}", make=make)
    for name, ratio, page, count in (("csa", 4, 32, 0), ("hca", 128, 1, 8192)):
        for tokens in (1, 64):
            make = partial(_pages, tokens, ratio, page, count)
            yield case(name=f"{name} {tokens}", make=make, size="big", bench=name, oracle=None)


def _pages(tokens: int, ratio: int, page: int, count: int) -> Arguments:
    """Pages in no order, and as many of each sequence as the last position needs."""
    wide = LAST // ratio // page + 1
    table = torch.arange(max(tokens, 1) * wide).mul(31).remainder(1_000_003).view(-1, wide)
    slots, positions = _places(tokens)
    return slots, positions, table, ratio, page, count


def _listed(given: Arguments, found: Any) -> BlockRows:
    slots, positions, table, ratio, page, count = given
    visible, own, rows = [], [], []
    for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
        pages = table[slot].tolist()
        lie = [pages[e // page] * page + e % page for e in range(min(count, (position + 1) // ratio))]
        entry = position // ratio
        visible.append((position + 1) // ratio)
        own.append(pages[entry // page] * page + entry % page)
        rows.append(lie + [-1] * (count - len(lie)))
    made = (torch.tensor(one, dtype=torch.int64, device=slots.device) for one in (visible, own, rows))
    return BlockRows(*(one.view(like.shape) for one, like in zip(made, found, strict=True)))
