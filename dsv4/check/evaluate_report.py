"""An evaluation as plain data: what `--json` writes, and the verdicts on the bars."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import torch

import dsv4
from dsv4.check.answers import Result, splits
from dsv4.check.evaluate import Evaluation, Plan
from dsv4.check.perplexity import total
from dsv4.check.score import BARS, CONFIDENCE, Bar, Row, Score, Verdict, verdict, wilson, worst

_MODES: Final = {True: "thinking", False: "plain"}


def mode(row: Row) -> str:
    """The name of a row's mode."""
    return _MODES[row.thinking]


def all_score(results: Sequence[Result]) -> Score:
    """Every answer of every row."""
    return Score(sum(result.score.right for result in results), sum(result.score.n for result in results))


def draft_score(found: Evaluation) -> Score:
    """First guesses of the draft that the model chose as well, over all that it answered."""
    return Score(sum(told.draft.right for told in found.told), sum(told.draft.n for told in found.told))


def answer_tokens(found: Evaluation) -> int:
    """Tokens of all answers."""
    return sum(answer.tokens for result in found.results for answer in result.answers)


def asking_seconds(found: Evaluation) -> float:
    """Seconds of all groups of questions, prompts included, one group after another, whatever ran side by side."""
    return sum(told.seconds for told in found.told)


class Judged(NamedTuple):
    """What became of a bar. `lower`: the least lower bound among those of its rows that were measured."""

    bar: Bar
    verdict: Verdict
    lower: float | None


def judged_bars(found: Evaluation) -> list[Judged]:
    """Every bar in the order of the table."""
    results = {result.row: result for result in found.results}
    return [
        _judged(bar, [results.get(row) for row in bar.rows]) if bar.rows else _drafted(bar, draft_score(found))
        for bar in BARS
    ]


def _judged(bar: Bar, results: Sequence[Result | None]) -> Judged:
    lowers = [wilson(*result.score)[0] for result in results if result and result.answers]
    return Judged(bar, worst([_on_row(result, bar.wanted) for result in results]), min(lowers, default=None))


def _drafted(bar: Bar, score: Score) -> Judged:
    return Judged(bar, verdict(score, bar.wanted), wilson(*score)[0] if score.n else None)


def _on_row(result: Result | None, wanted: float) -> Verdict:
    if result is None:
        return "not measured"
    return "cannot be asked" if result.why else verdict(result.score, wanted)


def failed(found: Evaluation) -> bool:
    """Whether some bar that was tried is not met."""
    return any(judged.verdict in ("not met", "cannot be asked") for judged in judged_bars(found))


def as_json(found: Evaluation, facts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Everything, down to each answer. `facts`: those of the loaded model, as `Resolved` prints them."""
    return {
        "versions": {"dsv4": dsv4.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "model": dict(facts),
        "plan": _plan(found.plan),
        "confidence": CONFIDENCE,
        "seconds": round(found.seconds, 3),
        "rows": [_row(result) for result in found.results],
        "all": all_score(found.results).as_json(),
        "draft": draft_score(found).as_json(),
        "perplexity": _perplexity(found),
        "mistakes": [damage.as_json() for damage in found.damages],
        "speed": {
            "alone": {"tokens": found.speed.tokens, "tokens_per_second": round(found.speed.rate, 3)},
            "side_by_side": {"tokens": answer_tokens(found), "seconds": round(asking_seconds(found), 3)},
        },
        "bars": [_bar(judged) for judged in judged_bars(found)],
    }


def _plan(plan: Plan) -> dict[str, Any]:
    names = ("items", "long_items", "seed", "tokens", "piece", "dialect")
    return {name: getattr(plan, name) for name in names} | {"options": asdict(plan.options)}


def _row(result: Result) -> dict[str, Any]:
    answers = result.answers
    return {
        "family": result.row.family,
        "mode": mode(result.row),
        "context": result.row.context,
        "cannot_be_asked": result.why,
        **result.score.as_json(),
        "keys": len({answer.key for answer in answers}),
        "cut_off": sum(answer.finish != "stop" for answer in answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "answer_tokens": sum(answer.tokens for answer in answers),
        "splits": {name: {label: s.as_json() for label, s in part.items()} for name, part in splits(answers).items()},
        "items": [asdict(answer) for answer in answers],
    }


def _perplexity(found: Evaluation) -> dict[str, Any]:
    read = [reading for reading in found.readings if reading.loss.tokens]
    seconds = sum(reading.seconds for reading in read)
    return {
        "total": total(reading.loss for reading in read).as_json() if read else None,
        "sources": {reading.source: reading.loss.as_json() for reading in read},
        "seconds": round(seconds, 3),
    }


def _bar(judged: Judged) -> dict[str, Any]:
    bar = judged.bar
    rows = [{"family": row.family, "mode": mode(row), "context": row.context} for row in bar.rows]
    return {"name": bar.name, "wanted": bar.wanted, "lower": judged.lower, "verdict": judged.verdict, "rows": rows}
