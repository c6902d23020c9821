"""Requests to the embedded model: an answer does not depend on company, chunks or readers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dsv4.config import EngineOptions
from dsv4.engine.request import Sampling
from dsv4.llm import LLM
from tests.arithmetic import finish


def load(pico_dir: Path, **asked: Any) -> LLM:
    return LLM.load(pico_dir, EngineOptions(**({"max_context": 256, "max_sequences": 3} | asked)))


ASKED = Sampling(seed=3, max_tokens=10)


def prompts(llm: LLM) -> list[list[int]]:
    draw = random.Random(4)
    return [draw.choices(range(300, llm.config.vocab_size), k=count) for count in (70, 3, 40, 131)]


def alone(llm: LLM, prompt: list[int]) -> list[int | None]:
    return [delta.token for delta in llm.generate(prompt, ASKED)]


def test_an_answer_is_the_same_alone_and_among_others(pico_dir: Path) -> None:
    """Sampled tokens of four requests in three slots, joined by chunks = those of each request alone."""
    llm = load(pico_dir, prefill_chunk=48)
    expected = [alone(llm, prompt) for prompt in prompts(llm)]
    numbers = [llm.engine.add(prompt, ASKED) for prompt in prompts(llm)]
    found = finish(llm.engine)
    assert [[delta.token for delta in found[number]] for number in numbers] == expected


@pytest.mark.parametrize("chunk", [1, 7])
def test_an_answer_is_the_same_for_every_chunk(chunk: int, pico_dir: Path) -> None:
    """The tokens of a request do not depend on how its prompt was cut."""
    llm, other = load(pico_dir, prefill_chunk=32), load(pico_dir, prefill_chunk=chunk)
    prompt = prompts(llm)[2]
    assert alone(llm, prompt) == alone(other, prompt)


def test_an_answer_that_nobody_reads_on_is_dropped(pico_dir: Path) -> None:
    llm = load(pico_dir, max_sequences=1)
    answer = llm.generate(prompts(llm)[1], ASKED)
    next(answer)
    assert llm.engine.busy
    answer.close()  # type: ignore[attr-defined]
    assert not llm.engine.busy
    assert len(alone(llm, prompts(llm)[1])) <= 10
