"""The indexer: which candidates are picked, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dsv4.check.cases.inputs import INF, NAN, normal, padded
from dsv4.check.contract import Arguments, Case
from dsv4.ops.index import entry_rows, select_rows

PICKED: Final = {"flash": 512, "pro": 1024}
TIMED: Final = (8192, 65_536, 262_144)  # candidates: a context of four times as many tokens
LEAST: Final = float.fromhex("0x1p-149")


def cases() -> Iterator[Case]:
    yield from _select()
    yield from _rows()


def _rows() -> Iterator[Case]:
    case = partial(Case, op=entry_rows, tokens=(0, 2), oracle=where)
    for tokens, count, page in ((1, 1, 1), (3, 512, 32), (2, 65, 3), (5, 40, 128), (0, 9, 32), (2, 0, 32)):
        yield case(name=f"{tokens} x {count}, pages of {page}", make=partial(_places, tokens, count, page))
    for tokens in (1, 64):
        make = partial(_places, tokens, 512, 32)
        yield case(name=f"flash csa {tokens}", make=make, size="big", bench="flash csa", moved=_moved_rows)


def _places(tokens: int, count: int, page: int) -> Arguments:
    """Every third entry is absent, and pages lie in no order."""
    wide = 7
    table = torch.arange((tokens + 1) * wide).mul(31).remainder(97).view(tokens + 1, wide)
    entries = torch.arange(tokens * count).mul(17).remainder(wide * page).view(tokens, count)
    entries[:, ::3] = -1
    return entries, table, torch.arange(tokens).mul(2).remainder(tokens + 1), page


def where(given: Arguments, found: Any) -> Tensor:
    """One after another."""
    entries, table, slots, page = given
    pages, of = table.tolist(), slots.tolist()
    rows = [
        [-1 if e < 0 else pages[s][e // page] * page + e % page for e in row]
        for s, row in zip(of, entries.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=entries.device).view(entries.shape)


def _moved_rows(given: Arguments, found: Any) -> int:
    return int(2 * found.nbytes)


def best(given: Arguments, found: Any) -> Tensor:
    """By a sort of numbers and indices."""
    scores, visible, k = given
    values, seen = scores.double().cpu().numpy(), visible.tolist()
    wanted = np.full((len(values), min(k, values.shape[1])), -1)
    for row, n, to in zip(values, seen, wanted, strict=True):
        clean = np.where(np.isnan(row[:n]), -np.inf, row[:n])
        order = np.lexsort((np.arange(len(clean)), -clean))[:k]
        to[: len(order)] = np.sort(order)
    return torch.from_numpy(wanted).to(scores.device)


def _select() -> Iterator[Case]:
    case = partial(Case, op=select_rows, tokens=(0, 1), oracle=best)
    for name, row in ROWS.items():
        for width, k in ((1500, 100), (1500, 512), (1500, 1024), (5000, 512)):
            make = partial(_alike, row, width, k)
            yield case(name=f"{name}, {k} of {width}", make=make, size="full" if width == 5000 else "small")
    yield case(name="all equal, 1 of 1500", make=partial(_alike, ROWS["all equal"], 1500, 1))
    for k in (1, 3, 127, 128, 129, 511, 512, 513, 700):
        yield case(name=f"{k} of counts about it", make=partial(_about, k))
    for name, width in (("no multiple of four", 701), ("one", 1), ("fewer than are picked", 40), ("none", 0)):
        yield case(name=f"a width of {name}", make=partial(counts, [0, 1, 2, 3, 40, 701], width, 128))
    yield case(name="rows at odd addresses", make=_odd)
    yield case(name="no token", make=partial(counts, [], 700, 512))
    yield case(name="as many as a token has by chance", make=partial(counts, list(range(0, 2100, 233)), 2100, 512))
    for k in PICKED.values():
        make = partial(counts, list(range(2101)), 2100, k)
        yield case(name=f"{k} of 0 to 2100", make=make, size="full", tokens=())
    for name, row in ROWS.items():
        for width in (40_000, 100_000, 262_144, 300_000):
            make = partial(_alike, row, width, 512)
            yield case(name=f"{name}, 512 of {width}", make=make, size="big")
    for label, k in PICKED.items():
        for width in TIMED:
            for tokens in (1, 64):
                make, name = partial(_random, tokens, width, k), f"{label}, {width} keys"
                yield case(name=f"{name} {tokens}", make=make, size="big", bench=name, oracle=None, moved=_moved)


def _moved(given: Arguments, found: Any) -> int:
    scores, visible, _ = given
    return int(scores.nbytes + visible.nbytes + found.nbytes)


def _random(tokens: int, width: int, k: int) -> Arguments:
    return normal("scores", tokens, width), torch.full((tokens,), width), k


def counts(visible: list[int], width: int, k: int) -> Arguments:
    """So many of them visible, or all; the others are larger than all of these, or NaN."""
    scores = normal("scores", len(visible), width)
    for row, n in zip(scores, visible, strict=True):
        row[n::2], row[n + 1 :: 2] = INF, NAN
    return scores, torch.tensor(visible).long(), k


def _about(k: int) -> Arguments:
    return counts([0, 1, k - 1, k, k + 1, 2 * k], 2 * k + 3, k)


def _odd() -> Arguments:
    scores, visible, k = counts([130, 131, 132, 700], 701, 128)
    return padded(scores, 2), visible, k


def _alike(row: Callable[[int, int], Tensor], width: int, k: int) -> Arguments:
    """Rows of one kind: all of it visible, all but one, and just more than are picked."""
    visible = [width, width - 1, k + 1]
    return torch.stack([row(n, k) for n in (width, width, width)]), torch.tensor(visible), k


def _ties(n: int, k: int) -> Tensor:
    """Blocks of equal numbers across the threshold: a few above, more than are left equal, the rest below."""
    at = torch.arange(n)
    return torch.where(at * 7919 % n < k // 3, 3.0, torch.where(at // 100 % 2 == 0, 2.0, 1.0))


def _special(n: int, k: int) -> Tensor:
    """Infinities, NaN of both signs, zeros of both signs and the least numbers, some ordinary."""
    bits = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0, 0x80000000, 1, 0x80000001]
    values = torch.from_numpy(np.array(bits, np.uint32).view(np.float32))
    row = values[torch.arange(n) * 31 % 97 % len(bits)].clone()
    row[::97] = normal("special", n)[::97]
    return row


def _zeros(n: int, k: int) -> Tensor:
    """Equal, whatever their sign; below the least number and above the least negative one."""
    at = torch.arange(n)
    signs = torch.where(at % 3 == 0, -0.0, 0.0)
    return torch.where(at % 5 == 1, -LEAST, torch.where(at % 11 == 7, LEAST, signs))


def _heap(n: int, k: int) -> Tensor:
    """The best side by side, far above the others."""
    row = normal("heap", n)
    row[n // 2 : n // 2 + k + 5] += 1000
    return row


# What a row may hold: n numbers, of which k are picked.
ROWS: Final[dict[str, Callable[[int, int], Tensor]]] = {
    "any": lambda n, k: normal("any", n),
    "rising": lambda n, k: torch.arange(n).float(),
    "falling": lambda n, k: -torch.arange(n).float(),
    "by turns": lambda n, k: torch.arange(n).float() * (1 - 2 * (torch.arange(n) % 2)),
    "all equal": lambda n, k: torch.full((n,), 0.5),
    "all minus infinity": lambda n, k: torch.full((n,), -INF),
    "all NaN": lambda n, k: torch.full((n,), NAN),
    "one above": lambda n, k: torch.arange(n).eq(n // 3).float(),
    "one below": lambda n, k: torch.arange(n).ne(n // 3).float(),
    "neighbouring numbers": lambda n, k: 1 + torch.arange(n).mul(31).remainder(n) * 2.0**-23,
    "the least numbers": lambda n, k: (torch.arange(n).mul(31).remainder(n) - n // 2) * LEAST,
    "of every size": lambda n, k: normal("size", n) * torch.exp2(30 * normal("power", n)),
    "the same again": lambda n, k: normal("again", n)[torch.arange(n) % 37],
    "ties": _ties,
    "special": _special,
    "zeros": _zeros,
    "a heap": _heap,
}
