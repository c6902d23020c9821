"""Anthropic's own client against /v1/messages. What the embedded model would not say is dictated."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests import PICO
from tests.messages import (
    ASK,
    MESSAGES,
    SAID,
    THINK,
    TOOLS,
    ask,
    client_of,
    events,
    refusal,
    same,
    streamed,
    total,
)
from tests.serving import FRANCE, OFF, STORY, Running, changed, dictated
from tests.test_server_tools import ARGUMENTS, BOTH, PARIS, block, invoke, parameter

if TYPE_CHECKING:
    import anthropic


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0))


@pytest.fixture(scope="module")
def client(server: Running) -> anthropic.Anthropic:
    return client_of(server)


@pytest.fixture(scope="module")
def actor() -> LLM:
    """Its words are dictated."""
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0, reuse_points=0))


@pytest.fixture(scope="module")
def player(stage: Running) -> anthropic.Anthropic:
    return client_of(stage)


# --- answers -----------------------------------------------------------------------------------------------------


def test_a_text(client: anthropic.Anthropic) -> None:
    whole = ask(client, system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}])
    (text,) = whole.content
    assert (text.type, text.text) == ("text", "The capital of France is Paris.")
    assert (whole.role, whole.model, whole.stop_reason, whole.stop_sequence) == ("assistant", "pico", "end_turn", None)
    assert whole.id.startswith("msg_")
    assert whole.usage.output_tokens == 12


@pytest.mark.parametrize("thinking", [THINK["thinking"], {"type": "adaptive"}])
def test_thinking_is_a_block_of_its_own(client: anthropic.Anthropic, thinking: Any) -> None:
    asked = {"thinking": thinking, "max_tokens": 80}
    whole = ask(client, **asked)
    assert [part.type for part in whole.content] == ["thinking", "text"]
    assert whole.content[0].signature
    assert whole.content[1].text == "The capital of France is Paris."
    assert 0 < whole.usage.output_tokens_details.thinking_tokens < whole.usage.output_tokens
    assert same(whole, streamed(client, **asked))


def test_without_a_word_or_with_disabled_it_does_not_think(client: anthropic.Anthropic) -> None:
    assert same(ask(client), ask(client, thinking={"type": "disabled"}))
    assert same(ask(client), streamed(client))


def test_thinking_that_is_cut_is_signed_as_well(client: anthropic.Anthropic) -> None:
    whole = ask(client, max_tokens=5, **THINK)
    (part,) = whole.content
    assert (part.type, whole.stop_reason) == ("thinking", "max_tokens")
    assert part.signature
    assert same(whole, streamed(client, max_tokens=5, **THINK))


@pytest.mark.parametrize(
    ("limits", "text", "reason", "stop"),
    [
        ({"max_tokens": 3}, "The capital of", "max_tokens", None),
        ({"stop_sequences": ["Rome", "is"]}, "The capital of France ", "stop_sequence", "is"),
        ({"stop_sequences": ["France is", "ce"]}, "The capital of Fran", "stop_sequence", "ce"),
        ({"stop_sequences": ["tal", "cap"]}, "The ", "stop_sequence", "cap"),  # both in one token
        ({"stop_sequences": ["Rome"]}, "The capital of France is Paris.", "end_turn", None),
    ],
)
def test_why_it_ended(client: anthropic.Anthropic, limits: Any, text: str, reason: str, stop: str | None) -> None:
    whole = ask(client, **limits)
    assert (whole.content[0].text, whole.stop_reason, whole.stop_sequence) == (text, reason, stop)
    assert same(whole, streamed(client, **limits))


def test_it_goes_on_from_what_it_is_said_to_have_begun(client: anthropic.Anthropic) -> None:
    begun = [*FRANCE, {"role": "assistant", "content": "The capital of France"}]
    assert ask(client, messages=begun).content[0].text == " is Paris."


@pytest.mark.slow
def test_sampling_is_that_of_a_chat(server: Running, client: anthropic.Anthropic) -> None:
    """The same answer to the last bit."""
    how = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 7}
    message = ask(client, how, messages=STORY)
    chat = server.post("/v1/chat/completions", how | OFF | {"messages": STORY, "max_tokens": 40}).json()
    assert message.content[0].text == chat["choices"][0]["message"]["content"]
    last = events(server, ASK | how | {"messages": STORY})[-2][1]
    assert (message.logit_hash, message.seed) == (last["logit_hash"], last["seed"]) == (chat["logit_hash"], 7)


def test_effort_and_format_are_those_of_a_chat(server: Running, client: anthropic.Anthropic) -> None:
    config: Any = {"effort": "high", "format": {"type": "json_schema", "schema": {"enum": ["yes"]}}}
    assert ask(client, output_config=config).content[0].text == '"yes"'
    sent = ASK | {"output_config": {"effort": "extreme"}}
    assert "no such effort; got extreme" in refusal(server.post(MESSAGES, sent), 400, "invalid_request_error")


# --- the wire ----------------------------------------------------------------------------------------------------


def test_the_order_of_events(stage: Running, actor: LLM) -> None:
    with dictated(actor, SAID) as ids:
        found = events(stage, ASK | THINK | {"tools": TOOLS, "max_tokens": 500})
    kinds = [
        said["delta"]["type"] if kind == "content_block_delta" else kind
        for kind, said in found
        if kind != "content_block_delta" or said["delta"]["type"] != "signature_delta"
    ]
    shape = [kind for n, kind in enumerate(kinds) if n == 0 or kind != kinds[n - 1]]
    blocks = ("thinking_delta", "text_delta", "input_json_delta", "input_json_delta")
    inner = [kind for delta in blocks for kind in ("content_block_start", delta, "content_block_stop")]
    assert shape == ["message_start", *inner, "message_delta", "message_stop"]
    signed = next(n for n, (_, said) in enumerate(found) if said.get("delta", {}).get("type") == "signature_delta")
    assert found[signed + 1][1] == {"type": "content_block_stop", "index": 0}
    starts = [said for kind, said in found if kind == "content_block_start"]
    assert [said["index"] for said in starts] == [0, 1, 2, 3]
    assert [said["content_block"]["type"] for said in starts] == ["thinking", "text", "tool_use", "tool_use"]
    assert starts[2]["content_block"] == starts[3]["content_block"] | {"id": starts[2]["content_block"]["id"]}
    assert starts[2]["content_block"]["input"] == {}
    first, last = found[0][1]["message"], found[-2][1]
    assert (first["content"], first["stop_reason"], first["usage"]["output_tokens"]) == ([], None, 1)
    assert last["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == len(ids)


def test_an_error_in_a_stream_is_an_event(server: Running, client: anthropic.Anthropic, llm: LLM) -> None:
    import anthropic

    """Logits that are no numbers, from the third token on."""
    with changed(llm, lambda work, logits: logits * (float("nan") if len(work.request.output) > 1 else 1)):
        found = events(server, ASK)
        with pytest.raises(anthropic.APIStatusError, match="not finite"):
            streamed(client)
        refusal(server.post(MESSAGES, ASK), 500, "api_error")
    assert [kind for kind, _ in found] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta", "error",
    ]  # fmt: skip
    assert found[-1][1]["error"]["type"] == "api_error"


# --- tools -------------------------------------------------------------------------------------------------------


def test_a_round_trip(stage: Running, player: anthropic.Anthropic, actor: LLM) -> None:
    """What the client was given and gives back is, to the model, what it had sampled."""
    asked: dict[str, Any] = {"tools": TOOLS, "max_tokens": 500, **THINK}
    with dictated(actor, SAID) as ids:
        first = ask(player, **asked)
        assert same(first, streamed(player, **asked))
    assert [part.type for part in first.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (first.content[0].thinking, first.content[1].text) == ("I must look.", "I look it up.")
    assert [part.input for part in first.content[2:]] == list(map(json.loads, ARGUMENTS))
    assert first.stop_reason == "tool_use"
    results: Any = [
        {"type": "tool_result", "tool_use_id": first.content[3].id, "content": "mild", "is_error": False},
        {"type": "tool_result", "tool_use_id": first.content[2].id, "content": [{"type": "text", "text": "warm"}]},
        {"type": "text", "text": "Well?"},
    ]
    talk: Any = [*FRANCE, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    with dictated(actor, "Done.</think>It is warm."):
        second = ask(player, **asked | {"messages": talk})
    assert second.content[1].text == "It is warm."
    before = first.usage.input_tokens + first.usage.cache_read_input_tokens
    after = second.usage.input_tokens + second.usage.cache_read_input_tokens
    rest = "<｜User｜><tool_result>warm</tool_result>\n\n<tool_result>mild</tool_result>\n\nWell?<｜Assistant｜><think>"
    assert after == before + len(ids) + len(actor.tokenizer.encode_raw(rest))


def test_a_call_that_is_cut_is_what_came_of_it(player: anthropic.Anthropic, actor: LLM) -> None:
    text = "So." + block(PARIS, invoke(parameter("city", "Rome"), parameter("day", "Monday")))
    limit = len(actor.tokenizer.encode_raw(text[: text.index("Mond") + 4]))
    with dictated(actor, text):
        whole = ask(player, tools=TOOLS, max_tokens=limit)
        assert same(whole, streamed(player, tools=TOOLS, max_tokens=limit))
    assert whole.stop_reason == "max_tokens"
    assert [part.input for part in whole.content[1:]] == [{"city": "Paris"}, {"city": "Rome"}]
    assert whole.unparsed["problems"] == ["the output ended inside a tool call"]


def test_a_call_without_arguments_and_text_behind_it(player: anthropic.Anthropic, actor: LLM) -> None:
    with dictated(actor, block(invoke()).removeprefix("\n\n") + "\nMore."):
        whole = ask(player, tools=TOOLS, max_tokens=200)
        assert same(whole, streamed(player, tools=TOOLS, max_tokens=200))
    assert [part.type for part in whole.content] == ["tool_use", "text"]
    assert (whole.content[0].input, whole.content[1].text) == ({}, "More.")


def test_how_calls_are_chosen(stage: Running, player: anthropic.Anthropic, actor: LLM) -> None:
    """At most one; none, and the model does not hear of them; one that must be made; a certain one."""
    asked: dict[str, Any] = {"tools": TOOLS, "max_tokens": 200}
    with dictated(actor, BOTH):
        one = ask(player, **asked, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
        assert [part.type for part in one.content] == ["text", "tool_use"]
        assert one.stop_reason == "tool_use"
        none = ask(player, **asked, tool_choice={"type": "none"})
        assert ([part.type for part in none.content], none.stop_reason) == (["text"], "end_turn")
        assert total(none.usage) == total(ask(player).usage) < total(one.usage)
        for choice in ({"type": "any"}, {"type": "tool", "name": "warmth"}):
            forced = ask(player, **asked, tool_choice=choice)
            assert {part.type for part in forced.content} == {"tool_use"}
    sent = ASK | {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "cold"}}
    assert "tool_choice" in refusal(stage.post(MESSAGES, sent), 400, "invalid_request_error")


def test_arguments_that_json_cannot_carry(stage: Running, player: anthropic.Anthropic, actor: LLM) -> None:
    """Half a character, written as JSON: whole it is an error that says so, streamed it is what the model wrote."""
    with dictated(actor, block(invoke(parameter("city", '"\\ud800"', False)))):
        sent = ASK | {"tools": TOOLS, "max_tokens": 200}
        assert "ask for a stream" in refusal(stage.post(MESSAGES, sent), 500, "api_error")
        parts = [said["delta"].get("partial_json", "") for _, said in events(stage, sent) if "delta" in said]
    assert "".join(parts) == '{"city": "\\ud800"}'
