"""The steps that compressors are judged by: which tokens of which sequences, over rings of which length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from dsv4.check.cases.compress_exact import own_of
from dsv4.check.cases.compress_given import Run, odd, rings
from dsv4.check.cases.inputs import BIG, MANY
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bounds

ALONE = (0, 4, 5)


class Judged(NamedTuple):
    """How the steps of one op are judged.

    case: `Case` with op, writes and bytes moved; make: the arguments of ratio, runs and length; near: bounds where so
    many of the tokens end a block; stored and exact: what is there, and what should be.
    """

    case: Callable[..., Case]
    make: Callable[..., Arguments]
    near: Callable[[int, int], Bounds]
    stored: Callable[..., Any]
    exact: Callable[..., Any]

    def by(self, ends: int, tokens: int) -> dict[str, Any]:
        bounds = self.near(ends, tokens)
        return {"bounds": bounds, "unfused_bounds": bounds, "oracle_bounds": bounds}


def listed(judged: Judged, ratio: int, more: str = "") -> Iterator[Case]:
    """All steps of one ratio; more: behind the names."""
    case, make = judged.case, partial(judged.make, ratio)
    there = {"outcome": judged.stored, "oracle": judged.exact}
    for label, runs, length in steps(ratio):
        by, size = judged.by(*_counted(runs, ratio)), "small" if sum(run.tokens for run in runs) <= 64 else "full"
        yield case(name=f"{label} of {ratio}{more}", make=partial(make, runs, length), size=size, **there, **by)
    yield case(name=f"odd numbers of {ratio}{more}", make=partial(odd, make, ratio), **there, **judged.by(1, 1))
    two = [Run(0, ratio - 1, 1), Run(1, 3 * ratio - 1, 1)]
    for label, how in (("small pages", {"page": 6}), ("pages apart", {"between": 72}), ("rows apart", {"beside": 8})):
        one = partial(make, two, rings(ratio), **how)
        yield case(name=f"{label}, {ratio}{more}", make=one, **there, **judged.by(1, 1))
    yield from _timed(judged, ratio, more)


def steps(ratio: int) -> Iterator[tuple[str, Sequence[Run], int]]:
    """Label, tokens of sequences, and how long the rings are."""
    usual = rings(ratio)
    yield "first block", [Run(0, 0, ratio)], usual
    yield "second block", [Run(1, ratio, ratio)], usual
    yield "a token that ends a block", [Run(0, 3 * ratio - 1, 1)], usual
    yield "a token that ends the first block", [Run(1, ratio - 1, 1)], usual
    yield "a token that ends none", [Run(0, 3 * ratio - 2, 1)], usual
    yield "a token that begins one", [Run(0, 3 * ratio, 1)], usual
    yield "no token", [], usual
    drafts = [Run(2, 3 * ratio - 2, 6), Run(0, ratio - 8 if ratio > 8 else 0, 8), Run(3, 5 * ratio - 1, 2)]
    yield "drafts across ends", drafts, usual
    nobody = Run(-1, 3, 1)
    yield "some that are nobody's", [nobody, Run(1, 2 * ratio - 3, 3), nobody, Run(0, ratio - 1, 1), nobody], usual
    yield "some not stored", [Run(1, 2 * ratio - 1, 1, stored=False), Run(2, ratio - 2, 2)], usual
    wrapped = [Run(n, 7 * ratio - 3 + n, 5) for n in range(3)]
    yield "rings that wrap around", wrapped, usual + 3
    yield "rings as short as can be", wrapped, usual - 8
    yield "more tokens than a ring has", [Run(1, ratio - 2, 3 * ratio + 3), Run(0, 1, 2)], usual - 7
    yield "all in one step", [Run(0, 0, 3 * ratio), Run(2, 1, ratio + 2), Run(1, ratio - 1, ratio)], 5 * ratio


def _timed(judged: Judged, ratio: int, more: str) -> Iterator[Case]:
    """Each token has the same terms wherever they are read from, so that it is the same alone."""
    make = partial(judged.make, ratio, length=rings(4) if ratio == 4 else 2 * ratio, settled=True)
    case = partial(judged.case, tokens=ALONE, outcome=partial(judged.stored, ring=own_of), bench="flash")
    exact = partial(judged.exact, ring=own_of)
    for tokens in (1, 64):
        for ends in (True, False):
            name = f"{'ending' if ends else 'no end'} of {ratio}{more}, {tokens}"
            runs = [Run(n, 4096 - (1 if ends else 2), 1) for n in range(tokens)]
            by, size = judged.by(tokens * ends, tokens), "small" if tokens == 1 else "full"
            yield case(name=name, make=partial(make, runs), oracle=exact, size=size, **by)
    by = judged.by(MANY // ratio, MANY)
    yield case(name=f"prefill of {ratio}{more}, {MANY}", make=partial(make, [Run(0, 3, MANY)]), size="big", **by)


def large(judged: Judged, more: str = "") -> Iterator[Case]:
    """More tokens than a grid's y holds, and pages more than 2^31 bytes apart."""
    case, make = partial(judged.case, outcome=judged.stored, size="big"), partial(judged.make, 4)
    every = [Run(0, 5, BIG)]
    yield case(name=f"{BIG} tokens{more}", make=partial(make, every, 4096), **judged.by(BIG // 4, BIG))
    some = [Run(n, 4 * n + 3, 8) for n in range(32)]
    yield case(name=f"past 2 GiB{more}", make=partial(make, some, 16, far=True), **judged.by(64, 256))


def _counted(runs: Sequence[Run], ratio: int) -> tuple[int, int]:
    """Blocks that end, and tokens."""
    ends = sum((run.start + run.tokens) // ratio - run.start // ratio for run in runs if run.slot >= 0 and run.stored)
    return ends, sum(run.tokens for run in runs)
