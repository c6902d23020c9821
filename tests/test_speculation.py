"""A draft changes when tokens come, never which: tokens and probabilities are bitwise those without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine import speculate
from dsv4.engine.choose import Chosen
from dsv4.engine.request import Sampling, Trace
from dsv4.errors import ConfigError
from dsv4.llm import LLM

QUESTIONS = ("What is the capital of France?", "Tell me a story.", "Which continent is Kenya in?")
GREEDY = Sampling(temperature=0, max_tokens=16, trace=16)
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


@pytest.mark.parametrize(
    ("guesses", "slots", "chunk"),
    [(4, 2, 5), *(pytest.param(*given, marks=pytest.mark.slow) for given in ((1, 1, 512), (2, 3, 512)))],
)
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


@pytest.mark.slow
def test_wrong_guesses_cost_nothing_but_time(
    pico_dir: Path, plain: list[list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft that is always wrong is rewound every time."""
    monkeypatch.setattr(speculate, "choose", lambda logits, rows: [Chosen(3, b"", True)] * len(rows))
    llm = load(pico_dir, 3)
    assert answers(llm, GREEDY) == plain[0]
    assert llm.engine.confirmed == 0


def test_the_answer_ends_where_it_would(pico_dir: Path) -> None:
    """Limits cut inside a confirmed run of guesses: never a token more."""
    for limit in (1, 2, 5, 6):
        found = answers(load(pico_dir, 4), replace(GREEDY, max_tokens=limit))
        assert [len(answer) for answer in found] == [limit] * len(QUESTIONS)


def test_more_guesses_than_can_be_rewound_are_refused() -> None:
    with pytest.raises(ConfigError, match="draft_tokens"):
        EngineOptions(draft_tokens=9, draft_slack=8)
    assert ModelConfig.named("flash-0731").draft == "dspark"


def test_no_guess_runs_past_the_end_of_the_context(pico_dir: Path) -> None:
    """Prompts of every length near the context's, each answered up to the last position."""
    plain, drafting = (LLM.load(pico_dir, EngineOptions(max_context=64, draft_tokens=n)) for n in (0, 2))
    for length in range(57, 64):
        ids = [300 + n for n in range(length)]
        wanted, found = ([(d.token, d.finish) for d in llm.generate(ids, GREEDY)] for llm in (plain, drafting))
        assert found == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk": 1, "draft_slack": 0},
        {"prefill_chunk": 1, "draft_slack": 2},
        {"prefill_chunk": 8, "draft_tokens": 8},
    ],
)
def test_rings_hold_a_token_and_its_draft(options: dict[str, int], pico_dir: Path) -> None:
    """Both are written at once: options that are accepted run."""
    llm = LLM.load(pico_dir, EngineOptions(max_context=64, **options))  # type: ignore[arg-type]
    assert len(list(llm.generate(prompts(llm)[0], GREEDY))) > 2
