"""The embedded model answers, predicts, drafts and stumbles as it was recorded to: no change makes it worse unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.gates import GATES, ITEMS, measured

# Another machine or library adds in another order and turns a close choice: so much is no change of the model.
FEWER_RIGHT = 0.01  # of all answers
ONE_ROW = ITEMS // 2  # answers of one row
NATS = 0.02
DRAFT = 0.03

RECORDED: dict[str, Any] = json.loads(GATES.read_text(encoding="utf-8"))


def check_answers(found: dict[str, Any]) -> None:
    assert found["share"] >= RECORDED["share"] - FEWER_RIGHT
    assert found["rows"].keys() == RECORDED["rows"].keys()
    worse = {row: (n, RECORDED["rows"][row]) for row, n in found["rows"].items() if n < RECORDED["rows"][row] - ONE_ROW}
    assert worse == {}


def check_texts(found: dict[str, Any]) -> None:
    assert found["nats of all"] == pytest.approx(RECORDED["nats of all"], abs=NATS)
    assert found["nats"] == pytest.approx(RECORDED["nats"], abs=5 * NATS)


def check_draft(found: dict[str, Any]) -> None:
    assert found["draft kept"] >= RECORDED["draft kept"] - DRAFT


def check_mistakes(found: dict[str, Any]) -> None:
    cost, before = (tree["mistakes"] for tree in (found, RECORDED))
    assert cost["sentinel missing"] > 2 * cost["none"]
    assert cost["wrong turn token"] > cost["none"]
    assert cost == pytest.approx(before, rel=0.25)


CHECKS = (check_answers, check_texts, check_draft, check_mistakes)


@pytest.mark.slow
def test_the_embedded_model_is_as_it_was_recorded() -> None:
    found = measured()
    for check in CHECKS:
        check(found)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"share": 0.0}, check_answers),
        ({"rows": dict.fromkeys(RECORDED["rows"], -ITEMS)}, check_answers),
        ({"nats of all": RECORDED["nats of all"] + 0.05}, check_texts),
        ({"nats": {name: nats * 1.05 for name, nats in RECORDED["nats"].items()}}, check_texts),
        ({"draft kept": RECORDED["draft kept"] - 0.1}, check_draft),
        ({"mistakes": RECORDED["mistakes"] | {"sentinel missing": RECORDED["mistakes"]["none"]}}, check_mistakes),
    ],
)
def test_a_model_that_became_worse_is_caught(change: dict[str, Any], check: Callable[[dict[str, Any]], None]) -> None:
    check(RECORDED)
    with pytest.raises(AssertionError):
        check(RECORDED | change)
