"""Prompts gone wrong: each mistake is made as named, and each costs what can be seen."""

from __future__ import annotations

import math

import pytest

from dsv4.chat.control import ASSISTANT, BOS, THINK, USER
from dsv4.check import malformed
from dsv4.check.malformed import MISTAKES, Damage, damages
from dsv4.check.score import Row
from dsv4.check.tasks.registry import FAMILIES
from dsv4.errors import PromptError
from dsv4.llm import LLM
from tests import PICO


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO)


def test_mistakes_are_made_as_named() -> None:
    controls = {BOS: 0, USER: 1, ASSISTANT: 2, THINK: 3}
    prompt = [0, 1, 50, 2, 60, 1, 51, 2, 3]
    made = {name: mistake(list(prompt), controls) for name, mistake in MISTAKES.items()}
    assert made == {
        "none": prompt,
        "sentinel missing": [0, 1, 50, 2, 60, 1, 51, 2],
        "sentence begun twice": [0, 0, 1, 50, 2, 60, 1, 51, 2, 3],
        "sentence not begun": [1, 50, 2, 60, 1, 51, 2, 3],
        "wrong turn token": [0, 1, 50, 2, 60, 1, 51, 1, 3],
    }


def test_sums() -> None:
    once = Damage("x").after([0.1, 0.5]).after([0.1, 3.0])
    assert once == Damage("x", pytest.approx(3.7), 4, 1, 2)  # type: ignore[arg-type]
    assert once.as_json()["nats_per_token"] == pytest.approx(3.7 / 4)
    assert Damage("x").as_json()["nats_per_token"] is None


@pytest.mark.slow
def test_mistakes_cost_the_embedded_model_what_they_must(llm: LLM) -> None:
    asked = [(Row("capital", thinking), FAMILIES["capital"]) for thinking in (True, False)]
    found = {damage.mistake: damage for damage in damages(llm, asked, 2, 0)}
    each = {name: damage.nats / damage.tokens for name, damage in found.items()}
    assert all(damage.answers == 4 and math.isfinite(each[name]) for name, damage in found.items())
    assert min(each, key=each.__getitem__) == "none"
    for mistake, least in (("sentinel missing", 0.1), ("wrong turn token", 0.01)):
        assert each[mistake] > each["none"] + least, mistake
        assert found[mistake].same < 4


def test_what_the_dialect_cannot_ask_is_left_out(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object) -> None:
        raise PromptError("no template")

    monkeypatch.setattr(malformed, "questions", refused)
    found = damages(llm, [(Row("capital", True), FAMILIES["capital"])], 1, 0)
    assert [damage.answers for damage in found] == [0] * len(MISTAKES)
