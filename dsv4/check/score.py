"""How sure a count of right answers makes us, and the bars that it is held against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

CONFIDENCE: Final = "ends of the two-sided 95 % Wilson score interval"
_Z: Final = 1.959963984540054  # the standard normal lies within ± this with probability 0.95


def wilson(right: int, n: int) -> tuple[float, float]:
    """Both ends of the two-sided 95 % score interval of a share (Wilson 1927): [0, 1] when nothing was counted.

    Its lower end is the stricter reading of a "lower 95 % bound": the true share lies below it once in forty times.
    """
    if not n:
        return 0.0, 1.0
    share, extra = right / n, _Z * _Z / n
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(extra * (share * (1 - share) + extra / 4)) / (1 + extra)
    return max(middle - half, 0.0), min(middle + half, 1.0)


class Score(NamedTuple):
    """`right` of `n`."""

    right: int
    n: int

    @classmethod
    def of(cls, verdicts: Sequence[bool]) -> Score:
        """One verdict an answer."""
        return cls(sum(verdicts), len(verdicts))

    @property
    def share(self) -> float | None:
        """right / n; None of nothing."""
        return self.right / self.n if self.n else None

    def as_json(self) -> dict[str, float | int | None]:
        """Count, share and interval."""
        lower, upper = wilson(*self)
        return {"n": self.n, "right": self.right, "share": self.share, "lower": lower, "upper": upper}


class Row(NamedTuple):
    """What a row of the table is about: a family in one mode, at one length of prompt if it can stretch."""

    family: str
    thinking: bool
    context: int | None = None


@dataclass(frozen=True)
class Bar:
    """The lower bound that `rows` have to reach, each of them; without rows, the draft's acceptance."""

    name: str
    wanted: float
    rows: tuple[Row, ...]


Verdict = Literal["met", "not met", "not measured", "cannot be asked"]
BARS: Final = (
    Bar("capitals, thinking", 0.95, (Row("capital", True),)),
    Bar("sums, thinking", 0.90, (Row("add", True),)),
    Bar("tool name and arguments", 0.90, (Row("tool_call", True), Row("tool_call", False))),
    Bar("needle at 8K", 0.95, (Row("needle", True, 8192), Row("needle", False, 8192))),
    Bar("needle at 32K", 0.80, (Row("needle", True, 32768), Row("needle", False, 32768))),
    Bar("first draft accepted", 0.60, ()),
)


def verdict(score: Score | None, wanted: float) -> Verdict:
    """Whether `score` shows a share of at least `wanted`; not measured if too few items could, were they all right."""
    if score is None or not score.n:
        return "not measured"
    lower, upper = wilson(*score)
    if lower >= wanted:
        return "met"
    too_few = wilson(score.n, score.n)[0] < wanted
    return "not measured" if too_few and upper >= wanted else "not met"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on a bar from those on its rows."""
    order: tuple[Verdict, ...] = ("not met", "cannot be asked", "not measured", "met")
    return min(verdicts, key=order.index)
