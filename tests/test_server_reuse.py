"""What the server says of reuse: cached tokens, hashes of logits, counters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.cli.main import main
from dsv4.config import EngineOptions
from dsv4.engine.scheduler import Work
from dsv4.llm import LLM
from dsv4.server.said import Said
from tests import PICO
from tests.serving import FRANCE, OFF, STORY, Running, changed, running

CHAT = "/v1/chat/completions"
PLAIN = {"temperature": 0, "max_tokens": 12} | OFF


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(LLM.load(PICO, EngineOptions(max_sequences=2, max_context=512, turn=2))) as server:
        yield server


def told(server: Running, messages: Any, **more: Any) -> dict[str, Any]:
    answer = server.post(CHAT, {"messages": messages} | PLAIN | more)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


def cached(said: dict[str, Any]) -> int:
    count: int = said["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def test_the_second_turn_of_a_chat_is_cached_and_counted(server: Running) -> None:
    """All of the first turn, the model's words included, but for the token that ended them."""
    first = told(server, FRANCE)
    assert cached(first) == 0
    before = server.metric("prompt_tokens_cached_total")
    talk = [*FRANCE, first["choices"][0]["message"], {"role": "user", "content": "And of Kenya?"}]
    second = told(server, talk)
    assert cached(second) == first["usage"]["total_tokens"] - 1
    assert server.metric("prompt_tokens_cached_total") == before + cached(second)
    again = told(server, talk)
    assert again["logit_hash"] == second["logit_hash"]


def test_what_was_sampled_comes_back_however_it_is_spelt(server: Running) -> None:
    """The model says letters one by one, as no tokenizer would: its next turn finds these ids, and no other does."""
    llm = server.service.llm
    letters = [llm.tokenizer.encode_text(letter)[0] for letter in "Paris"]
    ids, talk = [*letters, llm.tokenizer.eos_id, *[400] * 9], [{"role": "user", "content": "Spell it."}]

    def spelling(item: Work, logits: Tensor) -> Tensor:
        place = item.end - len(item.request.prompt)
        rows = [row.index_fill(0, torch.tensor(id), 1e4) for row, id in zip(logits, ids[place:], strict=False)]
        return torch.stack(rows) if rows else logits

    with changed(llm, spelling):
        first = told(server, talk)
    assert first["choices"][0]["message"]["content"] == "Paris"
    assert first["usage"]["completion_tokens"] == 6 > 1 + len(llm.tokenizer.encode_text("Paris"))
    goes_on = [first["choices"][0]["message"], {"role": "user", "content": "Again."}]
    assert cached(told(server, [*talk, *goes_on])) == first["usage"]["total_tokens"] - 1
    other = told(server, [{"role": "user", "content": "Spell it!"}, *goes_on])
    plain = server.post("/tokenize", {"messages": [{"role": "user", "content": "Spell it!"}, *goes_on]} | OFF).json()
    assert other["usage"]["prompt_tokens"] == plain["count"]


def test_only_the_latest_answers_are_remembered() -> None:
    said = Said(limit=2)
    for number in range(3):
        said.keep([7, number // 2, 9], [number])
    assert said.find([7, 0, 5]) == [[1]]  # whichever token opened the answer
    assert said.find([7, 1, 9]) == [[2]]
    assert said.find([8, 1, 9]) == []


def test_a_hash_names_the_bits_whole_or_streamed(server: Running) -> None:
    """Beside `seed`, and where each answer ends; another seed gives other logits behind the first token."""
    asked = {"seed": 5, "temperature": 2, "n": 2}
    whole = told(server, STORY, **asked)
    hashes = [choice["logit_hash"] for choice in whole["choices"]]
    assert whole["logit_hash"] == hashes[0] != hashes[1]
    assert all(len(bytes.fromhex(one)) == 16 for one in hashes)
    sent = {"messages": STORY, "stream": True, "stream_options": {"include_usage": True}} | PLAIN | asked
    lines = server.post(CHAT, sent).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    ends = {c["index"]: c["logit_hash"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]}
    assert [ends[0], ends[1]] == hashes
    assert (chunks[-1]["logit_hash"], chunks[-1]["seed"]) == (hashes[0], 5)
    assert cached(chunks[-1]) == 0


def test_completions_have_them_too(server: Running) -> None:
    sent = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
    first, second = (server.post("/v1/completions", sent).json() for _ in range(2))
    assert first["logit_hash"] == first["choices"][0]["logit_hash"] == second["logit_hash"]


@pytest.mark.slow
def test_who_waits_long_enough_gets_a_slot(server: Running) -> None:
    """Five answers in two slots, each step counts: turns are taken, and shown."""
    asked = {"seed": 1, "n": 5, "temperature": 2, "logit_bias": {"1": -100}}
    together = told(server, STORY, **asked)
    assert server.metric("preemptions_total") > 0
    alone = [told(server, STORY, **(asked | {"n": 1, "seed": 1 + n})) for n in range(5)]
    assert [one["logit_hash"] for one in alone] == [choice["logit_hash"] for choice in together["choices"]]
    assert server.metric("cache_pages") == 8
    assert server.metric("cache_pages_used") == 0


def test_a_cache_too_small_for_one_request_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--port", "0", "--cache-tokens", "1000", "--max-context", "2000"])
    said = capsys.readouterr().err
    assert "cache_tokens (--cache-tokens); got 1000; wanted at least the 2000 of one request's context" in said
