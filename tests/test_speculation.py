"""A draft changes when tokens come, never which: tokens and probabilities are bitwise those without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine import speculate
from dsv4.engine.request import Sampling, Trace
from dsv4.errors import ConfigError
from dsv4.llm import LLM

QUESTIONS = ("What is the capital of France?", "Tell me a story.", "Which continent is Kenya in?")
GREEDY = Sampling(temperature=0, max_tokens=24, trace=24)
SAMPLINGS = (GREEDY, replace(GREEDY, temperature=2, top_p=0.9, top_k=50, seed=7))

Answer = list[tuple[int, Trace | None]]


def load(pico_dir: Path, guesses: int, **options: int) -> LLM:
    return LLM.load(pico_dir, EngineOptions(draft_tokens=guesses, max_context=256, **options))


def prompts(llm: LLM) -> list[list[int]]:
    asked = [llm.prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [llm.tokenizer.encode_prompt(prompt.pieces) for prompt in asked]


def answers(llm: LLM, sampling: Sampling) -> list[Answer]:
    """All questions at once."""
    numbers = [llm.engine.add(prompt, sampling) for prompt in prompts(llm)]
    found: dict[int, Answer] = {number: [] for number in numbers}
    while llm.engine.busy:
        for delta in llm.engine.step():
            found[delta.number].append((delta.token, delta.trace))
    return [found[number] for number in numbers]


@pytest.fixture(scope="module")
def plain(pico_dir: Path) -> list[list[Answer]]:
    """Without a draft, one sequence at a time."""
    llm = load(pico_dir, 0)
    return [answers(llm, sampling) for sampling in SAMPLINGS]


@pytest.mark.parametrize(("guesses", "slots", "chunk"), [(1, 1, 512), (2, 3, 512), (4, 2, 5)])
def test_guessed_equals_not_guessed(
    guesses: int, slots: int, chunk: int, pico_dir: Path, plain: list[list[Answer]]
) -> None:
    """Tokens and the distributions behind them, greedy and sampled, alone and together, prompts whole and in chunks."""
    llm = load(pico_dir, guesses, max_sequences=slots, prefill_chunk=chunk)
    assert [answers(llm, sampling) for sampling in SAMPLINGS] == plain
    assert llm.engine.drafted > llm.engine.confirmed > 0


def test_a_trained_draft_is_worth_it(pico_dir: Path) -> None:
    """Nine first guesses in ten are what the model says: a draft fed with the wrong streams falls far below."""
    llm = load(pico_dir, 1)
    answers(llm, GREEDY)
    assert llm.engine.confirmed / llm.engine.drafted > 0.8


def test_wrong_guesses_cost_nothing_but_time(
    pico_dir: Path, plain: list[list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft that is always wrong is rewound every time."""
    monkeypatch.setattr(speculate, "choose", lambda logits, sampling, position: 3)
    llm = load(pico_dir, 3)
    assert answers(llm, GREEDY) == plain[0]
    assert llm.engine.confirmed == 0


def test_the_answer_ends_where_it_would(pico_dir: Path) -> None:
    """Limits cut inside a confirmed run of guesses: never a token more."""
    for limit in (1, 2, 5, 6):
        found = answers(load(pico_dir, 4), replace(GREEDY, max_tokens=limit))
        assert [len(answer) for answer in found] == [limit] * len(QUESTIONS)
    tight = LLM.load(pico_dir, EngineOptions(draft_tokens=4, max_context=24))
    found = answers(tight, GREEDY)
    assert [len(answer) + len(prompt) for answer, prompt in zip(found, prompts(tight), strict=True)] == [24] * 3


def test_more_guesses_than_can_be_rewound_are_refused() -> None:
    with pytest.raises(ConfigError, match="draft_tokens"):
        EngineOptions(draft_tokens=9, draft_slack=8)
    assert ModelConfig.named("flash-0731").draft == "dspark"
