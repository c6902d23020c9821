"""How sure a score makes us: the interval against published values, and verdicts on the bars."""

from __future__ import annotations

import pytest

from dsv4.check import evaluate
from dsv4.check.score import BARS, Score, verdict, wilson, worst
from dsv4.cli import eval as verb


@pytest.mark.parametrize(
    ("right", "n", "lower", "upper"),
    [  # the score method of Newcombe's comparison (Statistics in Medicine 17, 1998), to its four digits
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(right: int, n: int, lower: float, upper: float) -> None:
    assert wilson(right, n) == pytest.approx((lower, upper), abs=6e-5)


@pytest.mark.parametrize(
    ("right", "n", "wanted", "said"),
    [
        (197, 200, 0.95, "met"),
        (196, 200, 0.95, "not met"),
        (12, 12, 0.95, "not measured"),
        (11, 12, 0.95, "not measured"),
        (3, 12, 0.95, "not met"),
        (0, 0, 0.95, "not measured"),
        (15, 15, 0.80, "not measured"),
        (16, 16, 0.80, "met"),
    ],
)
def test_a_bar_is_met_by_the_lower_bound_and_few_items_show_nothing(
    right: int, n: int, wanted: float, said: str
) -> None:
    assert verdict(Score(right, n), wanted) == said


def test_a_bar_is_as_good_as_its_worst_row() -> None:
    assert worst(["met", "not measured"]) == "not measured"
    assert worst(["cannot be asked", "met"]) == "cannot be asked"
    assert worst(["met", "not met", "cannot be asked"]) == "not met"
    assert worst(["met", "met"]) == "met"


def test_every_bar_names_rows_that_exist() -> None:
    known = set(evaluate.planned((), verb.FULL.contexts))
    assert [row for bar in BARS for row in bar.rows if row not in known] == []
    assert sum(not bar.rows for bar in BARS) == 1  # the draft's
