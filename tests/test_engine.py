"""Requests in, tokens out: scheduling, stopping, errors, seeds. Mostly with a model made of arithmetic."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.cache.pages import Pages
from dsv4.engine.request import Request, Sampling
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.stop import StopText, finish_reason
from dsv4.errors import RequestError
from tests.arithmetic import (
    EOS,
    ROLE,
    VOCABULARY,
    Arithmetic,
    Guesses,
    Letters,
    answer,
    codes,
    engine,
    finish,
    splits,
    text,
)  # fmt: skip

# --- why an answer ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "output", "limit", "room", "wanted"),
    [
        (50, 3, 10, 5, None),
        (EOS, 3, 10, 5, "stop"),
        (ROLE, 3, 10, 5, "role_token"),
        (EOS, 10, 10, 0, "stop"),
        (ROLE, 10, 10, 0, "role_token"),
        (50, 10, 10, 0, "length"),
        (50, 9, 10, 0, "context"),
    ],
)
def test_finish_reason(token: int, output: int, limit: int, room: int, wanted: str | None) -> None:
    assert finish_reason(token, EOS, {ROLE}, output, limit, room) == wanted


@pytest.mark.parametrize(
    ("ids", "asked", "shown", "why"),
    [
        ([*codes("abc"), EOS], {}, "abc", "stop"),
        ([EOS], {}, "", "stop"),
        ([*codes("ab"), ROLE], {}, "ab", "role_token"),
        ([*codes("ab"), 3], {}, "ab", "role_token"),
        (codes("abcd"), {"max_tokens": 3}, "abc", "length"),
        (codes("abcd"), {"max_tokens": 1}, "a", "length"),
        (codes("say END now"), {"stop": ("END",)}, "say ", "stop_string"),
        (codes("say EN"), {"stop": ("END",), "max_tokens": 6}, "say EN", "length"),
        ([*codes("say EN"), EOS], {"stop": ("END",)}, "say EN", "stop"),
        (codes("abc"), {"stop": ("zz", "c", "bc")}, "a", "stop_string"),
        ([*codes("ab"), 105, EOS], {}, "abi", "stop"),  # "i" is held by the text stream and comes with the end
        ([*codes("ab"), 105, EOS], {"stop": ("bi",)}, "a", "stop"),
    ],
)
def test_an_answer_ends_with_its_reason_and_its_text(
    ids: list[int], asked: dict[str, Any], shown: str, why: str
) -> None:
    """Control tokens are reported but have no text; a stop string is cut off; what was held back comes at the end."""
    deltas = answer(ids, Sampling(**({"temperature": 0.0, "max_tokens": 20} | asked)))
    assert text(deltas) == shown
    assert deltas[-1].finish == why
    assert [d.finish for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert [d.token for d in deltas] == ids[: len(deltas)]


@pytest.mark.parametrize(("prompt", "tokens"), [(1, 15), (12, 4), (15, 1)])
def test_the_context_ends_an_answer_when_it_is_full(prompt: int, tokens: int) -> None:
    deltas = answer([], prompt=[9] * prompt, capacity=16)
    assert (len(deltas), deltas[-1].finish) == (tokens, "context")


# --- stop strings ----------------------------------------------------------------------------------------------------


def streamed(stops: tuple[str, ...], pieces: Sequence[str]) -> tuple[str, bool]:
    stop, shown = StopText(stops), ""
    for piece in pieces:
        more, hit = stop.push(piece)
        shown += more
        if hit:
            return shown, True
    return shown + stop.finish(), False


@pytest.mark.parametrize(
    ("stops", "whole", "wanted"),
    [
        ((), "anything", ("anything", False)),
        (("END",), "ENENDEND", ("EN", True)),
        (("aab",), "aaaab", ("aa", True)),
        (("abab", "ba"), "xabbab", ("xab", True)),
        (("END",), "no E, EN", ("no E, EN", False)),
        (("\n\n", "###"), "a\n##\n\n#", ("a\n##", True)),
        (("ab", "abc"), "zabc", ("z", True)),
        (("bcd", "c"), "abcd", ("ab", True)),  # "c" is complete before "bcd" is
    ],
)
def test_stop_strings_at_every_split(stops: tuple[str, ...], whole: str, wanted: tuple[str, bool]) -> None:
    """The result is a function of the text, not of how it was cut into tokens."""
    assert {streamed(stops, pieces) for pieces in splits(whole)} == {wanted}


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.text("abc", min_size=1, max_size=9))
def test_only_what_may_become_a_stop_string_is_held(stops: list[str], whole: str) -> None:
    """After every character: what is not shown is the longest end that begins a stop string."""
    stop, shown = StopText(tuple(stops)), ""
    for end in range(1, len(whole) + 1):
        more, hit = stop.push(whole[end - 1])
        shown += more
        if hit:
            assert any(whole[:end].endswith(s) and shown == whole[: end - len(s)] for s in stops)
            return
        held = max((n for s in stops for n in range(len(s)) if whole[:end].endswith(s[:n])), default=0)
        assert shown == whole[: end - held]
    assert shown + stop.finish() == whole


# --- scheduling ------------------------------------------------------------------------------------------------------


def request(number: int, prompt: int, output: int = 5) -> Request:
    asked, limit = Sampling(max_tokens=output), prompt + output
    return Request(number, (9,) * prompt, asked, limit=limit, text=Letters(), stop_text=StopText(()))


def scheduler_of(slots: int, chunk: int) -> Scheduler:
    """With memory for all."""
    return Scheduler(slots, chunk, Pages(100, 8), turn=512)


def test_slots_are_given_in_order_of_arrival_and_reused() -> None:
    scheduler = scheduler_of(2, 8)
    made = [request(n, 3) for n in range(4)]
    for one in made:
        scheduler.add(one)
    assert [r.number for r in scheduler.admit()] == [0, 1]
    assert {r.slot for r in made[:2]} == {0, 1}
    assert scheduler.admit() == []
    scheduler.remove(made[1])
    scheduler.remove(made[2])  # still waiting
    assert [(r.number, r.slot) for r in scheduler.admit()] == [(3, made[1].slot)]


def test_decodes_come_first_and_prompts_share_the_rest_oldest_first() -> None:
    scheduler = scheduler_of(4, 8)
    made = [request(0, 20), request(1, 2), request(2, 30), request(3, 5)]
    for one in made:
        scheduler.add(one)
    scheduler.admit()
    made[1].done, made[1].output = 2, [7]
    work = scheduler.schedule()
    assert [(w.request.number, w.start, w.end, w.sample) for w in work] == [(1, 2, 3, True), (0, 0, 7, False)]
    made[0].done = 19
    work = scheduler.schedule()
    assert [(w.request.number, w.end - w.start, w.sample) for w in work] == [(0, 1, True), (1, 1, True), (2, 6, False)]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 16),
    st.randoms(),
)
def test_every_request_is_run_once_and_to_its_end(
    asked: list[tuple[int, int]], slots: int, chunk: int, draw: random.Random
) -> None:
    """Any prompts, slots and chunk: tokens in order and once, slots never shared, no step beyond its budget."""
    runner = Arithmetic(slots=slots)  # checks the order of the tokens of every slot
    made = engine(runner, chunk)
    wanted = {}
    for prompt, output in asked:
        ids = [draw.randint(10, VOCABULARY - 1) for _ in range(prompt)]
        wanted[made.add(ids, Sampling(max_tokens=output, seed=1))] = output
    found = finish(made)
    assert {number: len(deltas) for number, deltas in found.items()} == wanted
    for step in runner.steps:
        assert len({number for number, _ in step}) == len(step) <= slots
        assert sum(count for _, count in step if count > 1) <= chunk


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 9),
    st.randoms(),
)
def test_drafts_change_no_answer(asked: list[tuple[int, int]], count: int, chunk: int, draw: random.Random) -> None:
    """Guesses right and wrong, of any number: the tokens and reasons of every request as without them."""
    prompts = [[draw.randint(10, VOCABULARY - 1) for _ in range(length)] for length, _ in asked]
    answers = []
    for drafts in (False, True):
        runner = Arithmetic()
        made = engine(runner, chunk, Guesses(runner, count, draw) if drafts else None)
        for prompt, (_, output) in zip(prompts, asked, strict=True):
            made.add(prompt, Sampling(max_tokens=output, seed=1))
        found = finish(made)
        answers.append({n: [(d.token, d.text, d.finish) for d in deltas] for n, deltas in found.items()})
    assert answers[0] == answers[1]


def test_a_prompt_moves_on_beside_more_decodes_than_a_chunk_holds() -> None:
    scheduler = scheduler_of(4, 2)
    made = [request(n, 3) for n in range(4)]
    for one in made:
        scheduler.add(one)
    scheduler.admit()
    for one in made[:3]:
        one.output, one.done = [9], 3
    assert [(w.request.number, w.start, w.end) for w in scheduler.schedule()][3:] == [(3, 0, 1)]


# --- seeds and traces ------------------------------------------------------------------------------------------------


def sampled(prompt: Sequence[int], seed: int, count: int = 12, **asked: Any) -> list[int | None]:
    made = engine(Arithmetic())
    number = made.add(prompt, Sampling(seed=seed, max_tokens=count, **asked))
    return [delta.token for delta in finish(made)[number]]


def test_a_seed_names_an_answer() -> None:
    assert sampled([40, 41], 5) == sampled([40, 41], 5)
    assert len({tuple(sampled([40, 41], seed)) for seed in range(10)}) == 10


def test_an_answer_can_be_resumed_from_its_own_tokens() -> None:
    """Prompt and the first tokens of an answer, given as a prompt, go on as the answer did."""
    whole = sampled([40, 41], 5)
    for done in (1, 5, 11):
        assert sampled([40, 41, *whole[:done]], 5, 12 - done) == whole[done:]  # type: ignore[list-item]


def test_a_bias_joins_the_choice_and_not_the_trace() -> None:
    """In sampling, with filters, with drafts: the tokens of a model whose logits are those sums."""
    bias = ((60, 4.0), (61, -3.5), (62, 100.0))
    asked = Sampling(seed=2, max_tokens=12, temperature=3, top_k=20, logit_bias=bias, trace=12, candidates=1)
    answers = []
    for drafts in (False, True):
        runner = Arithmetic()
        made = engine(runner, drafter=Guesses(runner, 2, random.Random(1)) if drafts else None)
        number = made.add([40], asked)
        answers.append([(d.token, d.trace) for d in finish(made)[number]])
    assert answers[0] == answers[1]
    biased, plain = Arithmetic(), Arithmetic().logits
    extra = torch.zeros(VOCABULARY)
    for id, amount in bias:
        extra[id] = amount
    biased.logits = lambda seen, place: plain(seen, place) + extra  # type: ignore[method-assign]
    other = engine(biased)
    number = other.add([40], replace(asked, logit_bias=()))
    assert [d.token for d in finish(other)[number]] == [token for token, _ in answers[0]]
    first = answers[0][0][1]
    assert first is not None
    assert first.ranking[0].logprob == pytest.approx(float(torch.log_softmax(plain([40], 0).double(), 0).max()))


def test_a_bias_for_a_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RequestError, match=f"no such token; got {VOCABULARY}; wanted 0 to {VOCABULARY - 1}"):
        engine(Arithmetic()).add([9], Sampling(logit_bias=((VOCABULARY, 1.0),)))


def test_a_trace_names_as_many_candidates_as_asked_lower_ids_first() -> None:
    for count in (0, 1, 7, 100):
        (delta,) = answer([70], Sampling(temperature=0, max_tokens=1, trace=1, candidates=count))
        assert delta.trace is not None
        ids = [candidate.id for candidate in delta.trace.ranking]
        assert (len(ids), ids[:1]) == (count, [70][:count])
        assert ids[1:] == sorted(ids[1:])  # all others are equal
        assert all(math.exp(c.logprob) == pytest.approx(c.probability) for c in delta.trace.ranking)
        assert math.exp(delta.trace.logprob) == pytest.approx(delta.trace.probability)


def test_a_trace_shows_the_first_steps() -> None:
    deltas = answer(codes("abc"), Sampling(temperature=0, max_tokens=3, trace=2))
    assert [delta.trace is not None for delta in deltas] == [True, True, False]
    trace = deltas[0].trace
    assert trace is not None
    assert trace.ranking[0].id == ord("a")
    assert (
        trace.ranking[0].probability == trace.probability == pytest.approx(2.718281828 / (2.718281828 + VOCABULARY - 1))
    )
    assert 0 < trace.entropy < 4.86
