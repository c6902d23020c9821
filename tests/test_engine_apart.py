"""One request among others: cancelled, refused, broken, on hold. The others notice nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.engine.request import NONE, Delta, Sampling
from dsv4.errors import NumericsError, RequestError
from tests.arithmetic import (
    EOS,
    GREEDY,
    VOCABULARY,
    Arithmetic,
    Guesses,
    engine,
    finish,
    text,
)  # fmt: skip

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
    made.hold(second, True)
    assert (made.step(), made.stalled, made.waiting) == ([], True, 2)
    made.hold(77, True)
    made.hold(second, False)
    assert not made.stalled
    made.cancel(first)
    assert list(finish(made)) == [second]
    assert made.stalled
