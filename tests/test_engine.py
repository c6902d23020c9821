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
from torch import Tensor

from dsv4.engine.request import NONE, Delta, Request, Sampling
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.stop import StopText, finish_reason
from dsv4.errors import NumericsError, RequestError
from tests.arithmetic import (
    EOS,
    GREEDY,
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


def test_slots_are_given_in_order_of_arrival_and_reused() -> None:
    scheduler = Scheduler(2, 8)
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
    scheduler = Scheduler(4, 8)
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
    scheduler = Scheduler(4, 2)
    made = [request(n, 3) for n in range(4)]
    for one in made:
        scheduler.add(one)
    scheduler.admit()
    for one in made[:3]:
        one.output, one.done = [9], 3
    assert [(w.request.number, w.start, w.end) for w in scheduler.schedule()][3:] == [(3, 0, 1)]


# --- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_cancelling_frees_the_slot_for_the_next(steps: int) -> None:
    """Before it was admitted, within its prompt, or while it answers: the next request is served as if alone."""
    runner = Arithmetic(slots=1)
    made = engine(runner)
    first, second = made.add([9] * 12, GREEDY), made.add([50, 51], GREEDY)
    for _ in range(steps):
        assert all(delta.number == first for delta in made.step())
    made.cancel(first)
    found = finish(made)
    assert list(found) == [second]
    fresh = engine(Arithmetic(slots=1))
    number = fresh.add([50, 51], GREEDY)
    assert [d.token for d in found[second]] == [d.token for d in finish(fresh)[number]]


def test_cancelling_what_ended_or_never_was_does_nothing() -> None:
    made = engine(Arithmetic([EOS], slots=1))
    assert made.step() == []
    number = made.add([9], GREEDY)
    finish(made)
    made.cancel(number)
    made.cancel(77)
    assert len(finish(made)) == 0
    again = made.add([9], GREEDY)
    assert again != number
    assert finish(made)[again][-1].finish == "stop"


def test_cancelling_a_waiting_request_leaves_the_others() -> None:
    made = engine(Arithmetic(slots=1))
    first, second, third = (made.add([n], GREEDY) for n in (50, 51, 52))
    made.step()
    made.cancel(second)
    assert set(finish(made)) == {first, third}


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "^the prompt is empty; wanted at least one token$"),
        ([9] * 64, "no room for an answer; got 64 tokens; wanted less than the context of 64"),
        ([9, VOCABULARY], f"does not exist; got 9 to {VOCABULARY}; wanted 0 to {VOCABULARY - 1}"),
        ([-1, 9], "does not exist; got -1 to 9"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused(prompt: list[int], said: str) -> None:
    made = engine(Arithmetic())
    with pytest.raises(RequestError, match=said):
        made.add(prompt, GREEDY)
    assert not made.busy


@pytest.mark.parametrize(
    "asked",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 1.1}, {"min_p": -0.1},
     {"max_tokens": 0}, {"trace": -1}, {"stop": ("a", "")}, {"candidates": -1}, {"logit_bias": ((1, 100.5),)},
     {"logit_bias": ((1, float("nan")),)}, {"logit_bias": ((1, True),)}, {"logit_bias": ((-1, 1),)},
     {"logit_bias": ((1, 1), (1, 2))}, {"logit_bias": ((1.0, 1),)}],
)  # fmt: skip
def test_sampling_out_of_range_is_refused_by_name(asked: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"^{next(iter(asked))}; got .*; wanted "):
        Sampling(**asked)


class Poisoned(Arithmetic):
    """Says "abc…" to those whose prompt begins with 50; from its fourth token on, one number is none."""

    value = float("nan")

    def logits(self, seen: list[int], place: int) -> Tensor:
        if seen[0] != 50:
            return super().logits(seen, place)
        row = 100 * torch.nn.functional.one_hot(torch.tensor(97 + place), VOCABULARY).float()
        return row.index_fill(0, torch.tensor([5]), self.value) if place == 3 else row


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("guesses", [False, True])
def test_logits_that_are_no_numbers_end_their_request_alone(
    value: float, guesses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others answer as if it had never been, and so does the next in its slot."""
    monkeypatch.setattr(Poisoned, "value", value)
    prompts = [[51, 52], [50, 9], [53], [54, 55]]
    runner, plain = Poisoned(), engine(Poisoned())
    made = engine(runner, drafter=Guesses(runner, 2, random.Random(1)) if guesses else None)
    for prompt in prompts:
        made.add(prompt, Sampling(seed=1, max_tokens=9))
        if prompt[0] != 50:
            plain.add(prompt, Sampling(seed=1, max_tokens=9))
    found, expected = finish(made), finish(plain)
    *fine, last = found.pop(1)
    assert text(fine) == "abc"
    assert (last.token, last.text, last.finish) == (NONE, "", "error")
    with pytest.raises(NumericsError, match="position 5 are not finite"):
        raise last.error or AssertionError
    for number, other in zip((0, 2, 3), range(3), strict=True):
        assert [d.token for d in found[number]] == [d.token for d in expected[other]]


def test_text_that_was_held_back_comes_before_an_error() -> None:
    """A stop string that may have begun, and half a character (a multiple of 7 is one)."""
    runner = Poisoned()
    made = engine(runner)
    number = made.add([50], Sampling(temperature=0, stop=("abcd",)))
    assert text(finish(made)[number]) == "abc"


# --- holding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_request_on_hold_waits_and_changes_nothing(steps: int, guesses: bool) -> None:
    """Within its prompt or its answer: others go on, its own tokens come later and are the same."""
    asked, runner = Sampling(seed=1, max_tokens=12), Arithmetic()
    plain = engine(Arithmetic())
    made = engine(runner, drafter=Guesses(runner, 2, random.Random(1)) if guesses else None)
    for one in (plain, made):
        for prompt in ([40] * 12, [41, 42], [43]):
            one.add(prompt, asked)
    expected = finish(plain)
    found: dict[int, list[Delta]] = {n: [] for n in range(3)}

    def step() -> None:
        for delta in made.step():
            found[delta.number].append(delta)

    for _ in range(steps):
        step()
    made.hold(0, True)
    before = len(found[0])
    while not made.stalled:
        step()
    assert len(found[0]) == before
    assert all(found[n][-1].finish for n in (1, 2))
    assert made.step() == []
    made.hold(0, False)
    while made.busy:
        step()
    assert {n: [d.token for d in ds] for n, ds in found.items()} == {
        n: [d.token for d in ds] for n, ds in expected.items()
    }


def test_a_held_request_can_be_cancelled_and_an_idle_engine_is_stalled() -> None:
    made = engine(Arithmetic(slots=1))
    assert made.stalled
    first, second = made.add([50], GREEDY), made.add([51], GREEDY)
    made.hold(first, True)
    assert not made.stalled  # it has no slot yet, and there is one
    assert (made.step(), made.stalled, made.waiting) == ([], True, 1)
    made.hold(77, True)
    made.cancel(first)
    assert list(finish(made)) == [second]
    assert made.stalled


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
