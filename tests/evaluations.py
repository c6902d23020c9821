"""Plans and results of `dsv4 eval`, made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4.check.answers import Answer, Result, Told
from dsv4.check.evaluate import Evaluation, Plan, Reading, Speed
from dsv4.check.perplexity import Loss
from dsv4.check.score import Row, Score
from dsv4.config import EngineOptions


def plan_of(rows: Sequence[Row], **changes: Any) -> Plan:
    given: dict[str, Any] = {"model": Path("m"), "texts": Path("t"), "options": EngineOptions(), "dialect": None}
    given |= {"rows": tuple(rows), "items": 1, "long_items": 1, "seed": 0, "tokens": None, "piece": 10}
    return Plan(**(given | changes))


def evaluation(results: Sequence[Result], draft: Score) -> Evaluation:
    told = Told(tuple(results), 1.0, draft)
    reading = Reading("a", Loss(1, 2, 1, 1, 1), 0.1)
    plan = plan_of([result.row for result in results])
    return Evaluation(plan, (told, told._replace(results=())), (reading,), (), Speed(1, 1.0), 1.0)


def row_of(right: int, n: int, row: Row) -> Result:
    verdicts = [True] * right + [False] * (n - right)
    return Result(row, tuple(Answer(str(k), 4, "", 1, "stop", v, {}) for k, v in enumerate(verdicts)))
