"""OpenAI's own client against /v1/responses: answers, streamed and whole."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import openai
import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests import PICO
from tests.babble import babbling
from tests.responses import (
    ANSWER,
    CHAT,
    DRY,
    FRANCE,
    PATH,
    TOOLS,
    Plan,
    ask,
    both,
    kinds,
    plain,
)
from tests.serving import OFF, STORY, Running


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0))


# --- answers -----------------------------------------------------------------------------------------------------


def test_an_answer_with_its_reasoning(server: Running, client: openai.OpenAI) -> None:
    whole = ask(client)
    reasoning, message = whole.output
    assert (reasoning.type, reasoning.summary, reasoning.content[0].type) == ("reasoning", [], "reasoning_text")
    assert reasoning.content[0].text.startswith("The user asks")
    assert whole.output_text == message.content[0].text == ANSWER
    assert (whole.object, whole.status, whole.model, whole.store) == ("response", "completed", "pico", False)
    assert [whole.id[:5], reasoning.id[:3], message.id[:4]] == ["resp_", "rs_", "msg_"]
    assert (whole.error, whole.incomplete_details, whole.metadata, whole.tools) == (None, None, {}, [])
    assert 0 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert plain(whole.to_dict()) == plain(both(server))


def test_without_reasoning(server: Running) -> None:
    whole = both(server, **DRY)
    assert kinds(whole) == [("message", "completed")]
    assert whole["output"][0]["content"][0]["text"] == ANSWER
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (5, [("reasoning", "incomplete")]),
        (32, [("reasoning", "completed"), ("message", "incomplete")]),
        (41, [("reasoning", "completed"), ("message", "completed")]),
    ],
)
def test_an_answer_that_is_cut(server: Running, limit: int, found: Any) -> None:
    whole = both(server, max_output_tokens=limit)
    assert kinds(whole) == found
    cut = limit < 41
    assert whole["status"] == ("incomplete" if cut else "completed")
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
    assert whole["usage"]["output_tokens"] == whole["max_output_tokens"] == limit


@pytest.mark.slow
def test_sampling_is_that_of_a_chat(server: Running) -> None:
    """The same answer to the last bit, and a seed that gives it again."""
    how = {"temperature": 1.0, "top_p": 0.9}
    first = server.post(PATH, how | DRY | {"input": "Tell me a story.", "max_output_tokens": 20}).json()
    seed = {"seed": first["seed"]}
    again = both(server, **how, **DRY, **seed, input=STORY, max_output_tokens=20)
    chat = server.post(CHAT, how | OFF | seed | {"messages": STORY, "max_tokens": 20}).json()
    assert first["output"][0]["content"] == again["output"][0]["content"]
    assert again["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert first["logit_hash"] == again["logit_hash"] == chat["logit_hash"]
    assert first["system_fingerprint"] == chat["system_fingerprint"]
    assert (first["temperature"], first["top_p"]) == (1.0, 0.9)


def test_what_was_there_already_is_told(server: Running) -> None:
    asked: dict[str, Any] = {"input": "A long way to go. " * 40, "max_output_tokens": 1}
    first, second = (server.post(PATH, asked).json()["usage"] for _ in range(2))
    assert first["input_tokens"] == second["input_tokens"]
    assert first["input_tokens_details"]["cached_tokens"] == 0 < second["input_tokens_details"]["cached_tokens"]


def test_what_was_asked_for_is_told_again(server: Running) -> None:
    asked: dict[str, Any] = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "tools": TOOLS,
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "high", "summary": None},
        "max_output_tokens": 1,
        "truncation": "disabled",
        "background": False,
    }
    told = both(server, **asked, store=True, user="x", safety_identifier="x", prompt_cache_key="x", service_tier="auto")
    assert told == told | asked | {"tools": [{"description": None} | TOOLS[0]], "store": False}


# --- the client --------------------------------------------------------------------------------------------------


def test_the_clients_own_streams(server: Running, client: openai.OpenAI) -> None:
    """It adds a stream up, by events and by itself; the same without waiting."""
    whole = plain(ask(client).to_dict())
    final = [event for event in ask(client, stream=True) if event.type == "response.completed"]
    assert [plain(event.response.to_dict()) for event in final] == [whole]
    with client.responses.stream(model="pico", input=FRANCE, temperature=0) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        assert snapshots[-1] == stream.get_final_response().output_text == ANSWER

    async def later() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as other:
            asked: dict[str, Any] = {"model": "pico", "input": FRANCE, "temperature": 0}
            async with other.responses.stream(**asked) as stream:
                streamed = await stream.get_final_response()
            return [await other.responses.create(**asked), streamed]

    alone, streamed = asyncio.run(later())
    assert plain(alone.to_dict()) == whole
    assert streamed.output_text == ANSWER


def test_a_pydantic_model_as_the_client_parses_it(player: openai.OpenAI, actor: LLM) -> None:
    asked: dict[str, Any] = {"model": "pico", "input": FRANCE, "text_format": Plan, "max_output_tokens": 900, **DRY}
    for seed in range(8):
        with babbling(actor, seed):
            whole = player.responses.parse(**asked, extra_body={"seed": seed})
            if whole.status != "completed":
                continue
            with player.responses.stream(**asked, extra_body={"seed": seed}) as stream:
                assert stream.get_final_response().output_parsed == whole.output_parsed
        assert isinstance(whole.output_parsed, Plan)
        return
    raise AssertionError("no answer came to an end")


@pytest.mark.parametrize("strict", [True, False])
def test_formats(stage: Running, actor: LLM, strict: bool) -> None:
    schema = {"type": "object", "properties": {"sure": {"enum": [True]}}, "required": ["sure"]} | {
        "additionalProperties": False
    }
    form = {"type": "json_schema", "name": "plan", "schema": schema, "strict": strict, "description": "A plan"}
    with babbling(actor, 1):
        whole = both(stage, **DRY, text={"format": form}, max_output_tokens=200, seed=1)
        any_object = both(stage, **DRY, text={"format": {"type": "json_object"}}, max_output_tokens=20, seed=1)
    jsonschema.validate(json.loads(whole["output"][0]["content"][0]["text"]), schema)
    assert whole["text"] == {"format": form}
    assert any_object["output"][0]["content"][0]["text"].lstrip().startswith("{")
