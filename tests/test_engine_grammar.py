"""A grammar in the engine: held from behind the reasoning, whatever else runs, with and without a draft."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import jsonschema
import pytest
import torch

from dsv4.chat.grammar_text import choice_answer, json_answer, regex_answer
from dsv4.config import EngineOptions
from dsv4.engine.choose import Row, choose
from dsv4.engine.request import Delta, Sampling
from dsv4.llm import LLM
from dsv4.ops.sample import allowed
from tests import PICO
from tests.babble import babbling

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
WARM = Sampling(temperature=1, max_tokens=150, trace=150, candidates=2)


def load(guesses: int = 0, **options: int) -> LLM:
    return LLM.load(PICO, EngineOptions(draft_tokens=guesses, max_context=512, **options))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load(max_sequences=3)


def asked(llm: LLM) -> list[tuple[list[int], Sampling]]:
    """Questions with and without reasoning, each held to something else, and one that is free."""
    held = [
        (False, json_answer(SCHEMA, strict=True)),
        (True, json_answer(SCHEMA, strict=True)),
        (False, choice_answer(["Paris", "Rome"])),
        (True, regex_answer("[A-Z][a-z]{1,9}( [A-Z][a-z]{1,9})*")),
        (False, None),
    ]
    found = []
    for seed, (thinking, answer) in enumerate(held):
        prompt = llm.prompt([{"role": "user", "content": "What is the capital of France?"}], thinking=thinking)
        sampling = replace(WARM, seed=seed, grammar=llm.grammar(answer, in_reasoning=thinking) if answer else None)
        found.append((llm.tokenizer.encode_prompt(prompt.pieces), sampling))
    return found


def answers(llm: LLM, wanted: Sequence[tuple[list[int], Sampling]]) -> list[list[Delta]]:
    """All at once."""
    numbers = [llm.engine.add(*one) for one in wanted]
    found: dict[int, list[Delta]] = {number: [] for number in numbers}
    while llm.engine.busy:
        for delta in llm.engine.step():
            found[delta.number].append(delta)
    return [found[number] for number in numbers]


def text(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def bits(found: Sequence[Sequence[Delta]]) -> list[list[object]]:
    return [[(delta.token, delta.text, delta.finish, delta.trace) for delta in deltas] for deltas in found]


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[Delta]]:
    return [answers(llm, [one])[0] for one in asked(llm)]


def test_each_answer_is_what_it_was_held_to(alone: list[list[Delta]]) -> None:
    plain, thought, choice, name, _ = map(text, alone)
    jsonschema.validate(json.loads(plain), SCHEMA)
    reasoning, _, content = thought.partition("</think>")
    jsonschema.validate(json.loads(content), SCHEMA)
    assert "{" not in reasoning
    assert choice in ("Paris", "Rome")
    assert name.partition("</think>")[2].istitle()
    assert [deltas[-1].finish for deltas in alone[:4]] == ["stop"] * 4


def test_in_company_it_has_the_same_bits(llm: LLM, alone: list[list[Delta]]) -> None:
    assert bits(answers(llm, asked(llm))) == bits(alone)


@pytest.mark.slow
@pytest.mark.parametrize("guesses", [1, 3])
def test_with_a_draft_it_has_the_same_bits(guesses: int, alone: list[list[Delta]]) -> None:
    llm = load(guesses, max_sequences=2)
    assert bits(answers(llm, asked(llm))) == bits(alone)
    assert llm.engine.drafted > llm.engine.confirmed > 0


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    """Before the mask: the first token of the held answer has the probability that it has in the free one."""
    free, held = (
        answers(llm, [(asked(llm)[0][0], replace(WARM, temperature=0, max_tokens=1, candidates=100, grammar=one))])[0][
            0
        ]
        for one in (None, llm.grammar(regex_answer("France|Paris")))
    )
    assert free.trace is not None
    assert held.trace is not None
    assert free.trace.ranking == held.trace.ranking
    assert held.trace.probability <= free.trace.probability


def test_max_tokens_cuts_what_is_held(llm: LLM) -> None:
    ids, sampling = asked(llm)[0]
    (deltas,) = answers(llm, [(ids, replace(sampling, max_tokens=5))])
    assert len(deltas) == 5
    assert deltas[-1].finish == "length"


def test_a_grammar_that_ends_with_the_last_token_is_no_cut(llm: LLM) -> None:
    ids, sampling = asked(llm)[2]
    whole = answers(llm, [(ids, sampling)])[0]
    (again,) = answers(llm, [(ids, replace(sampling, max_tokens=len(whole)))])
    assert again[-1].finish == "stop"
    assert again[-1].token != llm.tokenizer.eos_id  # nothing can follow, so nothing is waited for
    assert text(again) in ("Paris", "Rome")


def test_reasoning_that_never_ends_is_free(llm: LLM) -> None:
    ids, sampling = asked(llm)[1]
    end = llm.tokenizer.controls["</think>"]
    (deltas,) = answers(llm, [(ids, replace(sampling, max_tokens=40, logit_bias=((end, -100.0),)))])
    assert "{" not in text(deltas)


def test_no_bias_and_no_filter_lets_out_what_is_not_allowed(llm: LLM) -> None:
    """Also not one that leaves a single token, or forbids all that are allowed."""
    ids, _ = asked(llm)[2]
    held = llm.grammar(regex_answer("[ab]{3}"))
    letters = [llm.tokenizer.encode_text(letter)[0] for letter in "abc"]
    bias = tuple((id, amount) for id, amount in zip(letters, (-100.0, -100.0, 100.0), strict=True))
    for changes in ({"logit_bias": bias}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 100.0}):
        (deltas,) = answers(llm, [(ids, replace(WARM, grammar=held, **changes))])  # type: ignore[arg-type]
        assert set(text(deltas)) <= {"a", "b"}
        assert len(text(deltas)) == 3


def test_an_answer_too_complex_for_its_grammar_ends_alone(llm: LLM) -> None:
    many = {"enum": [{"a": n} for n in range(4000)]}
    ids, _ = asked(llm)[0]
    wanted = [(ids, replace(WARM, grammar=llm.grammar(json_answer(many, strict=True)))), asked(llm)[2]]
    broken, fine = answers(llm, wanted)
    assert broken[-1].finish == "error"
    assert "became too complex" in str(broken[-1].error)
    assert text(fine) in ("Paris", "Rome")


def test_tokens_by_chance_are_held_as_well() -> None:
    llm = load(reuse_points=0)
    held = llm.grammar(json_answer(SCHEMA, strict=True))
    ids, _ = asked(llm)[0]
    for seed in range(20):
        with babbling(llm, seed):
            (deltas,) = answers(llm, [(ids, replace(WARM, trace=0, max_tokens=300, temperature=1, grammar=held))])
        assert deltas[-1].finish == "stop"
        jsonschema.validate(json.loads(text(deltas)), SCHEMA)


def test_the_bits_of_a_mask() -> None:
    logits = torch.arange(21.0)
    mask = bytes([0b00000101, 0b10000000, 0b11111111])
    bits = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
    assert allowed(bits[None], 21)[0].nonzero().flatten().tolist() == [0, 2, 15, 16, 17, 18, 19, 20]
    greedy, other = Sampling(temperature=0), bytes([0, 0b11, 0])
    chosen = choose(torch.stack((logits, -logits)), [Row(greedy, 0, mask), Row(greedy, 0, other)])
    assert [one.token for one in chosen] == [20, 8]
    drawn = choose(torch.zeros(200, 21), [Row(Sampling(seed=seed), 5, mask) for seed in range(200)])
    assert {one.token for one in drawn} == {0, 2, 15, 16, 17, 18, 19, 20}
