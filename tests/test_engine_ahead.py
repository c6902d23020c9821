"""A step that is launched before the last one's tokens are read: the same answers, and the device always has work."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from dsv4.config import EngineOptions
from dsv4.engine.engine import Engine
from dsv4.engine.request import Delta, Sampling
from dsv4.errors import RequestError
from dsv4.llm import LLM
from tests import PICO
from tests.arithmetic import EOS, GREEDY, PAGE, VOCABULARY, Arithmetic, engine, finish

Answer = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Odd:
    """A grammar whose next tokens depend on those before; it breaks behind some, and is whole behind others."""

    end: int
    breaks: int

    def start(self) -> Odds:
        return Odds(self, [])


@dataclass
class Odds:
    grammar: Odd
    taken: list[int]

    def mask(self) -> bytes | None:
        if len(self.taken) == self.grammar.breaks:
            raise RequestError("no token fits the grammar")
        if sum(self.taken) % 3 == 0:
            return None
        bits = [token > 9 and (token + sum(self.taken)) % 5 < 2 for token in range(VOCABULARY)]
        return bytes(sum(bit << n for n, bit in enumerate(bits[at : at + 8])) for at in range(0, VOCABULARY, 8))

    def accept(self, token: int) -> bool:
        self.taken.append(token)
        return len(self.taken) == self.grammar.end


def asked(draw: random.Random) -> tuple[list[int], Sampling]:
    """Prompts that begin alike, and everything that can end an answer or say something about its tokens."""
    prompt = [40 + n // 5 for n in range(draw.choice((1, PAGE, 2 * PAGE, 19)))] + [draw.randint(10, 99)] * draw.randint(
        0, 9
    )
    return prompt, Sampling(
        temperature=draw.choice((0, 1, 1, 3)),
        top_k=draw.choice((0, 0, 5)),
        seed=draw.randint(0, 3),
        max_tokens=draw.randint(1, 30),
        stop=draw.choice(((), ("a",), ("bc", "K"))),
        logit_bias=draw.choice(((), ((50, 3.0), (EOS, 28.0)))),
        grammar=draw.choice((None, None, Odd(draw.randint(1, 12), draw.randint(1, 20)))),
        trace=draw.choice((0, 0, 3)),
    )


def said(deltas: list[Delta]) -> Answer:
    return [(d.token, d.text, d.finish, d.hash, d.trace, str(d.error)) for d in deltas]


@pytest.mark.parametrize("turn", [5, 20, 512])
@pytest.mark.parametrize("part", range(6))
def test_answers_are_those_of_steps_that_wait(part: int, turn: int, seed: int) -> None:
    """With requests that come later, are turned out, put on hold and cancelled in between."""
    draw = random.Random(f"{seed} {part} {turn}")
    given, actions = [asked(draw) for _ in range(8)], random.Random(draw.random())
    slots, chunk, points, pages = draw.randint(1, 4), draw.randint(2, 16), draw.choice((0, 5)), draw.choice((None, 9))
    plain, made = (
        engine(Arithmetic(slots=slots, points=points, pages=pages), chunk, turn=turn, ahead=ahead)
        for ahead in (False, True)
    )
    for one in given:
        plain.add(*one)
    wanted = finish(plain)
    found: dict[int, list[Delta]] = {n: [] for n in range(8)}
    late, gone = list(given), set()
    while late or made.busy:
        if late and (actions.random() < 0.3 or not made.busy):
            made.add(*late.pop(0))
        made.hold(actions.randrange(8), actions.random() < 0.3)
        if actions.random() < 0.02:
            gone.add(actions.randrange(8 - len(late)) if len(late) < 8 else 0)
            for number in gone:
                made.cancel(number)
        if made.stalled:
            for number in range(8):
                made.hold(number, False)
        for delta in made.step():
            found[delta.number].append(delta)
    for number in range(8):
        whole = said(wanted[number])
        assert said(found[number]) == whole[: len(found[number])], number
        assert number in gone or len(found[number]) == len(whole)
    assert made.step() == []
    assert made.stalled
    assert not made._scheduler.running
    assert not made.pages._promised


def test_a_step_is_launched_before_the_last_one_is_read() -> None:
    """And none behind the last token that a request may have: only what ends by itself runs once more for nothing."""
    runner = Arithmetic(slots=1)
    made = engine(runner, ahead=True)
    made.add([50, 51], Sampling(temperature=0, max_tokens=3))
    counts = []
    while made.busy:
        counts.append((len(made.step()), len(runner.steps)))
    assert counts == [(0, 1), (1, 2), (1, 3), (1, 3)]
    ended = Arithmetic([60, EOS, 61, 62], slots=1)
    made = engine(ended, ahead=True)
    number = made.add([50], GREEDY)
    assert [d.token for d in finish(made)[number]] == [60, EOS]
    assert len(ended.steps) == 3


def test_who_has_to_leave_is_asked_first_what_it_came_to() -> None:
    """Its last token is in flight when its slot is taken: nothing of its answer is lost."""
    plain, made = (engine(Arithmetic(slots=1), turn=2, ahead=ahead) for ahead in (False, True))
    for one in (plain, made):
        for prompt in ([40] * 12, [41, 42]):
            one.add(prompt, Sampling(seed=1, max_tokens=12))
    wanted, found = finish(plain), finish(made)
    assert made.preempted > 1
    assert {n: said(ds) for n, ds in found.items()} == {n: said(ds) for n, ds in wanted.items()}


# --- the real model --------------------------------------------------------------------------------------------------


def test_the_models_answers_and_their_hashes_are_the_same() -> None:
    """Of more requests than there are slots, some of which begin alike; then again, from what the first have left."""
    options = EngineOptions(draft_tokens=0, max_sequences=2, max_context=512, prefill_chunk=64, turn=10)
    made, answers = LLM.load(PICO, options).engine, []
    prompts = [[5 + n % 40 for n in range(count)] for count in (3, 130, 140, 60, 129)]
    for ahead in (False, True):
        made._ahead = ahead
        for _ in range(2):
            numbers = [made.add(prompt, Sampling(seed=n, max_tokens=20)) for n, prompt in enumerate(prompts)]
            found = finish(made)
            answers.append([said(found[number]) for number in numbers])
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert made.preempted


def test_a_device_ahead_of_the_host_takes_no_draft() -> None:
    with pytest.raises(AssertionError):
        Engine(Arithmetic(), 8, EOS, (), Any, object(), ahead=True)  # type: ignore[arg-type]
