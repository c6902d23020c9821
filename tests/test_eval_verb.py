"""`dsv4 eval` as it is called: what it prints and writes, what it refuses, and what other processes find."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from dsv4.check import evaluate
from dsv4.check.answers import Answer
from dsv4.check.evaluate import Found, Part, Plan
from dsv4.check.score import Row, Score
from dsv4.cli import eval as verb
from dsv4.errors import ConfigError, PromptError, RequestError
from dsv4.llm import LLM
from tests import PICO
from tests.evaluations import evaluation, row_of

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(verb.evaluate)
QUICK = ("--quick", "--items", "2", "--families", "capital,add")
KEYS_OF_A_ROW = {
    "family", "mode", "context", "cannot_be_asked", "n", "right", "share", "lower", "upper", "keys", "cut_off",
    "prompt_tokens", "answer_tokens", "splits", "items",
}  # fmt: skip


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Two short texts."""
    path = tmp_path / "heldout.jsonl"
    lines = [{"source": source, "text": "A dog sat in the sun."} for source in ("first", "second")]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


def run(*arguments: str) -> Any:
    done = CliRunner().invoke(app, arguments)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    times = ("seconds", "speed")
    return {
        name: [without_times(row) for row in value] if name == "rows" else
        without_times(value) if name == "perplexity" else value
        for name, value in report.items() if name not in times
    }  # fmt: skip


def test_memory_that_runs_out_is_said(texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(evaluate, "_SPEED_TOKENS", 4)
    monkeypatch.setattr(evaluate, "work", full)
    with pytest.raises(RequestError, match="lower --jobs or --max-sequences"):
        run(str(PICO), *QUICK, "--texts", texts, "--jobs", "1")


def test_the_verb_end_to_end(texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_SPEED_TOKENS", 4)
    done = run(str(PICO), *QUICK, "--texts", texts, "--json", "-", "--jobs", "1")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert list(report) == [
        "versions", "model", "plan", "confidence", "seconds", "rows", "all", "draft", "perplexity", "mistakes", "speed",
        "bars",
    ]  # fmt: skip
    assert [(row["family"], row["mode"]) for row in report["rows"]] == [
        (family, mode) for family in ("capital", "add") for mode in ("thinking", "plain")
    ]
    for row in report["rows"]:
        assert set(row) == KEYS_OF_A_ROW
        assert row["n"] == len(row["items"]) == 2
        assert row["right"] == sum(item["right"] for item in row["items"])
        assert row["prompt_tokens"] == sum(item["prompt_tokens"] for item in row["items"])
        assert all(set(item) == set(Answer.__dataclass_fields__) for item in row["items"])
    assert report["draft"]["n"] > 0
    assert list(report["perplexity"]["sources"]) == ["first", "second"]
    assert report["perplexity"]["total"]["tokens"] == 2 * report["perplexity"]["sources"]["first"]["tokens"]
    assert report["speed"]["alone"]["tokens_per_second"] > 0
    assert report["speed"]["side_by_side"]["tokens"] == sum(row["answer_tokens"] for row in report["rows"])
    assert {bar["verdict"] for bar in report["bars"]} <= {"met", "not met", "not measured", "cannot be asked"}
    for shown in ("capital", "thinking", "perplexity", "not measured", "tokens/s"):
        assert shown in done.stderr


@pytest.mark.slow
def test_shares_find_what_the_whole_finds(texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes' parts, done in this one, the last first."""
    parts: list[Part] = []

    def backwards(plan: Plan, given: Sequence[Part], jobs: int) -> Iterator[tuple[Part, Found]]:
        parts.extend(given)
        return evaluate._one_by_one(LLM.load(plan.model, plan.options), plan, given[::-1])

    monkeypatch.setattr(evaluate, "_SPEED_TOKENS", 4)
    monkeypatch.setattr(evaluate, "_side_by_side", backwards)
    given = (str(PICO), "--quick", "--items", "4", "--families", "add", "--texts", texts, "--json", "-", "--jobs")
    whole, shared = (without_times(json.loads(run(*given, jobs).stdout)) for jobs in ("1", "3"))
    assert [part.share for part in parts if part.rows and not part.mistaken] == [(0, 3), (1, 3), (2, 3)]
    assert shared == whole


@pytest.mark.slow
def test_two_processes_find_what_one_finds(texts: str, tmp_path: Path) -> None:
    reports = []
    for jobs in ("1", "2"):
        path = tmp_path / f"{jobs}.json"
        options = ("--items", "3", "--families", "capital", "--texts", texts, "--json", str(path), "--jobs", jobs)
        assert "capital" in run(*options).stdout
        reports.append(json.loads(path.read_text(encoding="utf-8")))
    assert without_times(reports[0]) == without_times(reports[1])


@pytest.mark.parametrize(("strict", "code"), [((), 0), (("--strict",), 1)])
def test_a_bar_that_is_not_met_is_no_error_unless_asked(
    strict: tuple[str, ...], code: int, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluation([row_of(0, 20, Row("capital", True))], Score(0, 0))
    monkeypatch.setattr(evaluate, "evaluate", lambda *given: found)
    assert run(str(PICO), "--quick", "--families", "capital", "--texts", texts, *strict).exit_code == code


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--families", "capital,nothing"), "--families; got nothing; wanted some of capital"),
        (("--contexts", "1024,many"), "--contexts; got 1024,many; wanted"),
        (("--texts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--dialect", "nothing"), "no such dialect"),
    ],
)
def test_a_mistake_is_told_before_anything_is_asked(
    options: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "one_alone", None)
    with pytest.raises((RequestError, ConfigError, PromptError), match=why):
        run("--quick", *options)
