"""The library as a program uses it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.checkpoint.synth import synth
from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine.request import Delta, Sampling
from dsv4.errors import ConfigError, NumericsError, RequestError
from dsv4.llm import EMBEDDED, LLM

FRANCE, JAPAN = ([{"role": "user", "content": f"What is the capital of {name}?"}] for name in ("France", "Japan"))
SHORT = Sampling(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(options=EngineOptions(max_sequences=2, max_context=256))


def text(deltas: Iterator[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_a_question_has_an_answer(llm: LLM) -> None:
    answer = llm.ask("What is the capital of France?")
    assert answer.content == "The capital of France is Paris."
    assert answer.reasoning.startswith("The user asks")
    assert llm.ask("What is the capital of Japan?", thinking=False).content == "The capital of Japan is Tokyo."


def test_answers_read_side_by_side_lose_nothing(llm: LLM) -> None:
    prompts = [llm.prompt(messages, thinking=False) for messages in (FRANCE, JAPAN, FRANCE)]
    alone = [text(llm.generate(prompt, SHORT)) for prompt in prompts]
    together = [llm.generate(prompt, SHORT) for prompt in prompts]
    found = ["", "", ""]
    unread = set(range(3))
    while unread:
        for n in sorted(unread):
            delta = next(together[n], None)
            if delta is None:
                unread.remove(n)
            else:
                found[n] += delta.text
    assert found == alone
    assert not llm.engine.busy


def test_an_iterator_that_is_dropped_leaves_nothing(llm: LLM) -> None:
    never_read, begun = (llm.generate(llm.prompt(FRANCE), SHORT) for _ in range(2))
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    del never_read
    assert not llm.engine.busy


def test_two_who_step_one_engine_are_told(llm: LLM) -> None:
    number = llm.engine.add([300, 301], SHORT)
    with pytest.raises(RequestError, match="stepped by two"):
        list(llm.generate([300, 301], SHORT))
    llm.engine.cancel(number)


@pytest.mark.parametrize("prompt", [[], [1.5], ["a"], [10**6], [-1], [5] * 256])
def test_a_prompt_that_cannot_be_served_is_refused_at_once(prompt: list[int], llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompt)


@pytest.mark.parametrize(
    "asked", [{"stop": "Paris"}, {"stop": ("",)}, {"top_k": 1.5}, {"temperature": None}, {"max_tokens": True}]
)
def test_sampling_of_the_wrong_type_is_refused(asked: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(asked))):
        replace(SHORT, **asked)  # type: ignore[arg-type]


def test_a_context_nobody_asked_for_is_cut_to_the_models(tmp_path: Path) -> None:
    config = replace(ModelConfig.named("tiny-pro"), max_position_embeddings=2048)
    synth(config, tmp_path / "X", text_from=EMBEDDED)
    assert LLM.load(tmp_path / "X").resolved.options.max_context == 2048
    with pytest.raises(ConfigError, match="max-context"):
        LLM.load(tmp_path / "X", EngineOptions(max_context=2049))


def test_guesses_without_a_drive_are_refused(tmp_path: Path) -> None:
    synth(ModelConfig.named("tiny-flash-0731"), tmp_path / "X", text_from=EMBEDDED)
    assert LLM.load(tmp_path / "X").engine.drafted == 0
    with pytest.raises(ConfigError, match="--draft"):
        LLM.load(tmp_path / "X", EngineOptions(draft_tokens=2))


def test_numbers_that_are_not_finite_are_an_error_of_the_weights(pico_dir: Path) -> None:
    llm = LLM.load(pico_dir, EngineOptions(max_context=64))
    llm.engine._runner.model.head.fill_(float("nan"))
    with pytest.raises(NumericsError, match="damaged"):
        list(llm.generate([300], SHORT))


def test_a_narrow_model_runs_on_one_thread_unless_told(monkeypatch: pytest.MonkeyPatch, pico_dir: Path) -> None:
    monkeypatch.delenv("DSV4_THREADS", raising=False)
    assert ("threads", "1") in LLM.load(pico_dir).resolved.facts
    monkeypatch.setitem(os.environ, "DSV4_THREADS", "2")
    assert ("threads", "2") in LLM.load(pico_dir).resolved.facts
    monkeypatch.setitem(os.environ, "DSV4_THREADS", "1")
    LLM.load(pico_dir)
