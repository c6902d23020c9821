"""Requests to the embedded model: an answer does not depend on company, chunks or readers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dsv4.config import EngineOptions
from dsv4.engine.request import Sampling
from dsv4.errors import ConfigError
from dsv4.llm import LLM, _rehearse
from dsv4.llm_start import Stages
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


@pytest.mark.slow
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


@pytest.mark.slow  # the profiler needs seconds to begin
def test_no_step_needs_more_memory_than_the_one_that_is_rehearsed(pico_dir: Path) -> None:
    """Peak of all tensors made, with every kind of step: prompts of any length to the context's end, beside answers."""
    llm = load(pico_dir, max_context=260, prefill_chunk=120)
    draw = random.Random(1)

    def serve() -> None:
        for count in (4, 258, 250):
            llm.engine.add(draw.choices(range(300, llm.config.vocab_size), k=count), replace(ASKED, max_tokens=2))
        finish(llm.engine)

    llm.engine._runner.rehearse(120, 8)  # the first step decodes weights, and keeps them
    most = peak(lambda: llm.engine._runner.rehearse(120, 8))
    assert 0.5 * most < peak(serve) <= most


def peak(action: Callable[[], None]) -> int:
    """Bytes of tensors at the worst moment, less those of before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        action()
    assert found.profiler is not None
    made = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(made))


def test_a_step_that_does_not_fit_is_refused_before_anybody_is_served(pico_dir: Path) -> None:
    class Full:
        def rehearse(self, chunk: int, draft: int) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match=r"largest step does not fit.*; got 512 tokens of prompts and 1 sequences"):
        _rehearse(Full(), EngineOptions(), 0, Stages(None))  # type: ignore[arg-type]
