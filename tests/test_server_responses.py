"""OpenAI's own client against /v1/responses. What the embedded model would not say is dictated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests.babble import babbling
from tests.serving import OFF, STORY, Running, dictated, named_events, running
from tests.test_server_tools import ARGUMENTS, BOTH, PARIS, block, invoke, parameter

PATH, CHAT = "/v1/responses", "/v1/chat/completions"
FRANCE = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
DRY: dict[str, Any] = {"reasoning": {"effort": "none"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [{"type": "function", "name": "warmth", "parameters": SCHEMA, "strict": False}]
SAID = "I must look.</think>" + BOTH
LOGPROBS: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
DONE = ("completed", "incomplete", "failed")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(options=EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0))


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def actor() -> LLM:
    """Its words are dictated, or chance's."""
    return LLM.load(options=EngineOptions(max_sequences=2, max_context=2048, draft_tokens=0, reuse_points=0))


@pytest.fixture(scope="module")
def stage(actor: LLM) -> Iterator[Running]:
    with running(actor) as server:
        yield server


@pytest.fixture(scope="module")
def player(stage: Running) -> openai.OpenAI:
    return stage.client()


def ask(client: openai.OpenAI, extra: Any = None, **asked: Any) -> Any:
    given: dict[str, Any] = {"input": FRANCE, "temperature": 0} | asked
    return client.responses.create(model="pico", extra_body=extra, **given)


def plain(response: Any) -> Any:
    """A response without its names, its time, and what an earlier request had left for it."""
    if isinstance(response, list):
        return [plain(one) for one in response]
    if not isinstance(response, dict):
        return response
    names = ("id", "item_id", "call_id", "created_at", "cached_tokens", "seed", "logit_hash")
    return {name: plain(value) for name, value in response.items() if name not in names}


def judged(events: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The response of a stream, whose events have the right order, form and sum."""
    for n, (kind, said) in enumerate(events):
        assert said["sequence_number"] == n
        assert EVENTS.validate_python(said).type == kind
    kinds = [kind for kind, _ in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    for _, said in events[:2]:
        assert (said["response"]["status"], said["response"]["output"]) == ("in_progress", [])
    response: dict[str, Any] = events[-1][1]["response"]
    assert kinds[-1] == f"response.{response['status']}"
    assert sum(kind.removeprefix("response.") in DONE for kind in kinds) == 1
    rest = events[2:-1]
    for index, item in enumerate(response["output"]):
        own = [said for _, said in rest if said["output_index"] == index]
        assert own == [said for _, said in rest[: len(own)]]  # item after item
        rest = rest[len(own) :]
        judge_item(item, own)
    assert not rest
    return response


def judge_item(item: dict[str, Any], own: list[dict[str, Any]]) -> None:
    """Opened, spelt out, closed; what was spelt is what it holds at the end."""
    assert {said.get("item_id", item["id"]) for said in own} == {item["id"]}
    part = item["content"][0] if "content" in item else None
    begun = {"status": "in_progress"} | ({"content": []} if part else {"arguments": ""})
    assert own[0] == own[0] | {"type": "response.output_item.added", "item": item | begun}
    assert own[-1] == own[-1] | {"type": "response.output_item.done", "item": item}
    stem = f"response.{part['type']}" if part else "response.function_call_arguments"
    deltas = [said for said in own if said["type"] == f"{stem}.delta"]
    done = next(said for said in own if said["type"] == f"{stem}.done")
    frame = [own[0], *([own[1]] if part else []), *deltas, done, *([own[-2]] if part else []), own[-1]]
    assert frame == own
    spelt = "".join(said["delta"] for said in deltas)
    assert all(said["delta"] for said in deltas)
    if part is None:
        assert spelt == done["arguments"] == item["arguments"]
        return
    assert spelt == done["text"] == part["text"]
    assert {said["content_index"] for said in own[1:-1]} == {0}
    empty = part | {"text": ""} | ({"logprobs": []} if "logprobs" in part else {})
    assert own[1] == own[1] | {"type": "response.content_part.added", "part": empty}
    assert own[-2] == own[-2] | {"type": "response.content_part.done", "part": part}
    if "logprobs" in part:
        assert [entry for said in deltas for entry in said["logprobs"]] == done["logprobs"] == part["logprobs"]
        assert all(set(said["delta"]) for said in deltas)


def both(server: Running, **asked: Any) -> dict[str, Any]:
    """A response, which is the same streamed and whole."""
    sent = {"input": FRANCE, "temperature": 0} | asked
    answer = server.post(PATH, sent)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    Response.model_validate(whole)
    assert plain(judged(named_events(server, PATH, sent))) == plain(whole)
    return whole


def kinds(response: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item["type"], item["status"]) for item in response["output"]]


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


class Plan(BaseModel):
    days: list[bool]
    sure: bool


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


# --- tools -------------------------------------------------------------------------------------------------------


def test_reasoning_text_and_calls_are_items(stage: Running, actor: LLM) -> None:
    with dictated(actor, SAID) as ids:
        whole = both(stage, tools=TOOLS)
    calls = ("function_call", "completed")
    assert kinds(whole) == [("reasoning", "completed"), ("message", "completed"), calls, calls]
    assert whole["output"][0]["content"][0]["text"] == "I must look."
    assert whole["output"][1]["content"][0]["text"] == "I look it up."
    assert [(item["name"], item["arguments"]) for item in whole["output"][2:]] == [("warmth", a) for a in ARGUMENTS]
    assert len({item["call_id"] for item in whole["output"][2:]} | {item["id"] for item in whole["output"]}) == 6
    assert whole["usage"]["output_tokens"] == len(ids)


@pytest.mark.parametrize("how", ["create", "stream", "parse"])
def test_a_round_trip(player: openai.OpenAI, actor: LLM, how: str) -> None:
    """What the client was given and gives back is, to the model, the very ids that it had sampled."""
    first: Any
    with dictated(actor, SAID) as ids:
        if how == "stream":
            with player.responses.stream(model="pico", input=FRANCE, tools=TOOLS) as stream:
                first = stream.get_final_response()
        else:
            first = getattr(player.responses, how)(model="pico", input=FRANCE, tools=TOOLS)
    one, other = [item.call_id for item in first.output if item.type == "function_call"]
    results = [
        {"type": "function_call_output", "call_id": other, "output": "mild"},
        {"type": "function_call_output", "call_id": one, "output": [{"type": "input_text", "text": "warm"}]},
    ]
    talk: list[Any] = [{"role": "user", "content": FRANCE}, *first.output, *results]
    with dictated(actor, "Done.</think>It is warm."):
        second = ask(player, input=talk, tools=TOOLS)
    assert second.output_text == "It is warm."
    rest = "<｜User｜><tool_result>warm</tool_result>\n\n<tool_result>mild</tool_result><｜Assistant｜><think>"
    begun = first.usage.input_tokens + len(ids)
    assert second.usage.input_tokens == begun + len(actor.tokenizer.encode_raw(rest))


def test_a_call_that_is_cut_is_incomplete(stage: Running, actor: LLM) -> None:
    text = "So." + block(PARIS, invoke(parameter("city", "Rome"), parameter("day", "Monday")))
    limit = len(actor.tokenizer.encode_raw(text[: text.index("Mond") + 4]))
    with dictated(actor, text):
        whole = both(stage, tools=TOOLS, max_output_tokens=limit, **DRY)
    done, cut = ("function_call", "completed"), ("function_call", "incomplete")
    assert (whole["status"], kinds(whole)) == ("incomplete", [("message", "completed"), done, cut])
    assert '{"city": "Rome", "day": "Monday"}'.startswith(whole["output"][2]["arguments"])
    assert whole["unparsed"]["problems"] == ["the output ended inside a tool call"]


def test_a_call_that_breaks_is_incomplete(stage: Running, actor: LLM) -> None:
    with dictated(actor, block(PARIS.replace("</｜DSML｜invoke>", "nonsense"))):
        whole = both(stage, tools=TOOLS, **DRY)
    assert (whole["status"], kinds(whole)) == ("completed", [("function_call", "incomplete")])
    assert "nonsense" in whole["unparsed"]["text"]


def test_a_call_without_arguments_and_text_behind_it(stage: Running, actor: LLM) -> None:
    with dictated(actor, block(invoke()).removeprefix("\n\n") + "\nMore."):
        whole = both(stage, tools=TOOLS, **DRY, **LOGPROBS)
    assert kinds(whole) == [("function_call", "completed"), ("message", "completed")]
    assert (whole["output"][0]["arguments"], whole["output"][1]["content"][0]["text"]) == ("{}", "More.")
    assert spelt(whole["output"][1]) == "More."


def test_how_calls_are_chosen(stage: Running, actor: LLM) -> None:
    """At most one; none, and the model does not hear of them; one that must be made; a certain one; one of some."""
    cold = {"type": "function", "name": "cold"}
    asked: dict[str, Any] = {"tools": [*TOOLS, cold], "max_output_tokens": 300, **DRY}
    call = {"type": "function", "name": "warmth"}
    with dictated(actor, BOTH):
        one = both(stage, **asked, parallel_tool_calls=False)
        assert kinds(one) == [("message", "completed"), ("function_call", "completed")]
        none = both(stage, **asked, tool_choice="none")
        assert kinds(none) == [("message", "completed")]
        for choice in ("required", call, {"type": "allowed_tools", "mode": "required", "tools": [call]}):
            forced = both(stage, **asked, tool_choice=choice)
            assert {item["type"] for item in forced["output"]} == {"function_call"}
            assert forced["tool_choice"] == choice
        some = both(stage, **asked, tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [call]})
    counts = [both(stage, tools=tools, max_output_tokens=1, **DRY)["usage"] for tools in ([], TOOLS, asked["tools"])]
    found = [answer["usage"]["input_tokens"] for answer in (none, some, one)]
    assert found == [usage["input_tokens"] for usage in counts]


def test_a_strict_tool_as_the_client_makes_it(player: openai.OpenAI, actor: LLM) -> None:
    """Its arguments are held to the schema, and parsed."""
    asked: dict[str, Any] = {"model": "pico", "input": FRANCE, "max_output_tokens": 900, **DRY}
    asked |= {"tools": [openai.pydantic_function_tool(Plan)["function"] | {"type": "function"}]}
    for seed in range(8):
        with babbling(actor, seed):
            whole = player.responses.create(**asked, tool_choice="required", extra_body={"seed": seed})
        if whole.status == "completed":
            for item in whole.output:
                Plan.model_validate_json(item.arguments)
            assert whole.tools[0].strict
            return
    raise AssertionError("no answer came to an end")


# --- logprobs ----------------------------------------------------------------------------------------------------


def spelt(item: dict[str, Any]) -> str:
    entries = item["content"][0]["logprobs"]
    return bytes(byte for entry in entries for byte in entry["bytes"]).decode()


@pytest.mark.parametrize("more", [{}, DRY])
def test_logprobs_are_of_the_text_alone(server: Running, more: Any) -> None:
    """Those that a chat has for these tokens, without those of the reasoning and of the end."""
    item = both(server, **LOGPROBS, **more)["output"][-1]
    assert spelt(item) == ANSWER
    sent = {"messages": [{"role": "user", "content": FRANCE}], "temperature": 0, "logprobs": True, "top_logprobs": 2}
    chat = server.post(CHAT, sent | ({"reasoning_effort": "none"} if more else {})).json()
    entries = chat["choices"][0]["logprobs"]["content"]
    assert item["content"][0]["logprobs"] == entries[-1 - len(item["content"][0]["logprobs"]) : -1]
    assert both(server, **more)["output"][-1]["content"][0]["logprobs"] == []


@pytest.mark.parametrize("text", ["Straße 中文 \u2603!", "One.\n\n\nTwo <b>\n", "<think", "M>m</b>", ">", "\nx\n\n"])
def test_logprobs_of_text_among_marks(stage: Running, actor: LLM, text: str) -> None:
    """Letters of several tokens, and what might be a part of a mark; behind reasoning, before a call, behind one."""
    call = block(PARIS)
    for before, behind in (("", ""), ("So. M> I must.</think>", ""), ("", call), (call + "\n\n", "")):
        more = {} if "</think>" in before else DRY
        with dictated(actor, before + text + behind):
            whole = both(stage, tools=TOOLS, **LOGPROBS, **more)
        item = next(item for item in whole["output"] if item["type"] == "message")
        said = item["content"][0]["text"]
        assert said == (text.lstrip() if call in before else text)
        assert spelt(item).strip("\n") == said.strip("\n")  # a token may hold a mark's newlines as well
