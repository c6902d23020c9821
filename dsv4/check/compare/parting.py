"""Answers in two ways held against each other, token for token: where they part, and whether rounding explains it.

Up to the first token that differs both ways have read the same, and their logits can be held against each other. Let
way a choose x there and way b choose y. The *margin* of a way is the difference of its two best logits. Its *gap* is
how far the other's token lies below its own: l_a(x) - l_a(y) of a, l_b(y) - l_b(x) of b, neither below 0; the margin,
where the two tokens are the best two. The gaps add up to [l_a(x) - l_b(x)] + [l_b(y) - l_a(y)]: so one of the two
logits is off by at least their mean.

The *floor* is the largest |difference of a logit| between way a and way a with every embedded number moved by one unit
in its last place (`record.shaken`), over all positions that both reached by the same tokens, and the logits that both
have among their best. It is what rounding alone does to this model, and it does not depend on b: a floor measured
between a and b would grow with whatever is wrong in b, and excuse it. Where the mean gap is larger than the floor, b
moved a logit by more than rounding moves any: that is a wrong token and no near-tie.

The largest of thousands is a choice of experts that turned, and a small error in every product hides behind it. So the
*median* is held against the floor's as well: other roundings that are right moved it to 0.9 and 1.1 of that, rotations
too large by 3 % to 2.7 (LOG.md), and more than `MEDIANS` times is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, NamedTuple

from dsv4.check.compare.answers import Answer, Token

MEDIANS: Final = 2.0  # times the floor's median, beyond which a way's is more than rounding


class Parting(NamedTuple):
    """An answer that goes two ways. prompt: its number; position: in the answer, from 0; all pairs: a's, then b's.

    Logits are in nats. A gap is that of the last logit kept, so at least so much, where the other's token is not
    among those.
    """

    prompt: int
    position: int
    tokens: tuple[int, int]
    margins: tuple[float, float]
    gaps: tuple[float, float]

    @property
    def moved(self) -> float:
        """Nats by which one of the two logits is off at least."""
        return sum(self.gaps) / 2


class Spread(NamedTuple):
    """|differences of logits| in nats behind the same tokens: how many, the largest, the median. NaN of none."""

    logits: int
    largest: float
    median: float


@dataclass(frozen=True)
class Held:
    """Answers of b against a. equal: how many are; by_rounding: of a, shaken; floor: a against that; apart: a and b."""

    answers: int
    tokens: int
    equal: int
    by_rounding: int
    floor: Spread
    apart: Spread
    partings: tuple[Parting, ...]

    @property
    def wrong(self) -> list[Parting]:
        """Those that rounding does not explain, the worst first."""
        return sorted((one for one in self.partings if not one.moved <= self.floor.largest), key=lambda p: -p.moved)

    @property
    def all_over(self) -> bool:
        """Whether logits differ by more than rounding makes, be there a wrong token or none."""
        return self.apart.median > MEDIANS * self.floor.median

    @property
    def right(self) -> bool:
        """Whether rounding explains all that differs."""
        return not (self.wrong or self.all_over)

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        wrong = {one.prompt for one in self.wrong}
        partings = [one._asdict() | {"moved": one.moved, "wrong": one.prompt in wrong} for one in self.partings]
        counts = {name: getattr(self, name) for name in ("answers", "tokens", "equal", "by_rounding")}
        spreads = {name: _plain(getattr(self, name)) for name in ("floor", "apart")}
        return {"right": self.right, **counts, "wrong": len(wrong), **spreads, "partings": partings}


def _plain(spread: Spread) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in spread._asdict().items()}


def hold(a: Sequence[Answer], moved: Sequence[Answer], b: Sequence[Answer]) -> Held:
    """moved: a's own answers, shaken. All three are to the same prompts."""
    partings = [one for number, pair in enumerate(zip(a, b, strict=True)) if (one := parting(number, *pair))]
    equal_moved = sum(parting(0, *pair) is None for pair in zip(a, moved, strict=True))
    tokens = sum(map(len, a))
    return Held(len(a), tokens, len(a) - len(partings), equal_moved, spread(a, moved), spread(a, b), tuple(partings))


def parting(number: int, a: Answer, b: Answer) -> Parting | None:
    """Where two answers to one prompt part, or None: an answer that ends does so by a token that the other lacks."""
    for position, (ours, theirs) in enumerate(zip(a, b, strict=False)):
        if ours.id != theirs.id:
            gaps = gap(ours, theirs.id), gap(theirs, ours.id)
            margins = gap(ours, ours.best[1][0]), gap(theirs, theirs.best[1][0])
            return Parting(number, position, (ours.id, theirs.id), margins, gaps)
    assert len(a) == len(b), "equal tokens end together"
    return None


def gap(token: Token, other: int) -> float:
    """How far another token's logit lies below that of the chosen one; of the last that was kept if it was not."""
    kept = dict(token.best)
    return kept[token.id] - kept.get(other, token.best[-1][1])


def spread(a: Sequence[Answer], b: Sequence[Answer]) -> Spread:
    """Of answers to the same prompts: of each up to and with the position where they part."""
    found = [abs(x - y) for pair in zip(a, b, strict=True) for x, y in _logits(*pair)]
    return Spread(len(found), max(found), median(found)) if found else Spread(0, math.nan, math.nan)


def _logits(a: Answer, b: Answer) -> Iterator[tuple[float, float]]:
    for ours, theirs in zip(a, b, strict=False):
        other = dict(theirs.best)
        yield from ((logit, other[id]) for id, logit in ours.best if id in other)
        if ours.id != theirs.id:
            return
