"""Answers held to a grammar on the wire, through OpenAI's own client. The model says what chance will have."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests import PICO
from tests.babble import babbling
from tests.serving import FRANCE, OFF, Running, dictated
from tests.test_server_refusals import error
from tests.test_server_tools import added_up, block, parameter

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, None]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}


def tool(name: str = "warmth", parameters: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=2048, draft_tokens=0, reuse_points=0))


def ask(client: openai.OpenAI, extra: Any = OFF, **asked: Any) -> Any:
    given: dict[str, Any] = {"messages": FRANCE, "max_tokens": 900, "seed": 5} | asked
    return client.chat.completions.create(model="pico", extra_body=extra, **given)


@pytest.mark.parametrize("seed", range(4))
def test_json_schema_whole_and_streamed(client: openai.OpenAI, llm: LLM, seed: int) -> None:
    with babbling(llm, seed):
        whole = ask(client, response_format=FORMAT).choices[0]
        message, _ = added_up(ask(client, response_format=FORMAT, stream=True))
    assert whole.finish_reason == message["finish_reason"] == "stop"
    jsonschema.validate(json.loads(whole.message.content), SCHEMA)
    assert whole.message.content == message["content"]
    assert not hasattr(whole, "unparsed")


def test_a_pydantic_model_as_the_client_parses_it(client: openai.OpenAI, llm: LLM) -> None:
    class Step(BaseModel):
        kind: Literal["walk", "ride"]
        note: str | None

    class Plan(BaseModel):
        steps: list[Step]
        sure: bool

    for seed in range(5):
        with babbling(llm, seed):
            answer = client.chat.completions.parse(
                model="pico", messages=FRANCE, response_format=Plan, max_tokens=1500, seed=seed, extra_body=OFF
            )
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(answer.choices[0].message.parsed, Plan)
            return
    raise AssertionError("no answer came to an end")


def test_json_object(client: openai.OpenAI, llm: LLM) -> None:
    for seed in range(6):
        with babbling(llm, seed):
            choice = ask(client, response_format={"type": "json_object"}).choices[0]
        assert choice.message.content.lstrip().startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("structure", "right"),
    [
        ({"choice": ["Paris", "Rome"]}, "Paris|Rome"),
        ({"regex": r"[a-f]{4}/[0-9]{2}", "json": None}, r"[a-f]{4}/[0-9]{2}"),
        ({"grammar": 'start: "<" /[ab]{3}/ ">"', "json_object": False}, "<[ab]{3}>"),
        ({"json": {"enum": [17, 18]}}, "1[78]"),
    ],
)
def test_structured_outputs_of_chats_and_texts(server: Running, llm: LLM, structure: Any, right: str) -> None:
    sent = {"structured_outputs": structure, "max_tokens": 50, "n": 2}
    with babbling(llm, 3):
        chat = server.post(CHAT, sent | OFF | {"messages": FRANCE}).json()["choices"]
        text = server.post(TEXT, sent | {"prompt": ["A", "B"]}).json()["choices"]
    for said in [choice["message"]["content"] for choice in chat] + [choice["text"] for choice in text]:
        assert re.fullmatch(right, said)


@pytest.mark.slow
def test_reasoning_first(client: openai.OpenAI) -> None:
    """The real model: it thinks as it likes, and then answers as it must."""
    for stream in (False, True):
        extra = {"structured_outputs": {"regex": "The capital of France is (Paris|Rome), surely"}}
        answer = ask(client, extra, temperature=0, stream=stream)
        message = added_up(answer)[0] if stream else answer.choices[0].message.model_dump()
        assert message["content"] == "The capital of France is Paris, surely"
        assert len(message["reasoning"]) > 5


def test_reasoning_cut_by_max_tokens_has_no_content(client: openai.OpenAI) -> None:
    choice = ask(client, {}, response_format=FORMAT, max_tokens=3).choices[0]
    assert choice.finish_reason == "length"
    assert not choice.message.content


def test_tokens_and_logprobs_are_one_to_one(client: openai.OpenAI, llm: LLM) -> None:
    with babbling(llm, 1):
        answer = ask(client, response_format=FORMAT, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    said = b"".join(bytes(entry.bytes) for entry in entries).removesuffix("<｜end▁of▁sentence｜>".encode())
    assert said.decode() == answer.choices[0].message.content


def calls(choice: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]


@pytest.mark.parametrize("seed", range(4))
def test_a_call_is_required(client: openai.OpenAI, llm: LLM, seed: int) -> None:
    asked: dict[str, Any] = {"tools": [tool(), tool("other", {})], "tool_choice": "required"}
    with babbling(llm, seed):
        whole = ask(client, **asked).choices[0]
        message, _ = added_up(ask(client, stream=True, **asked))
        one = ask(client, parallel_tool_calls=False, **asked).choices[0]
    assert whole.finish_reason == message["finish_reason"] == one.finish_reason == "tool_calls"
    assert not whole.message.content
    found = calls(whole)
    assert found
    assert found == [(call["name"], json.loads(call["arguments"])) for call in message["calls"].values()]
    for name, arguments in found:
        jsonschema.validate(arguments, SCHEMA if name == "warmth" else {"maxProperties": 0})
    assert len(calls(one)) == 1
    assert not hasattr(whole, "unparsed")


def test_a_named_call_behind_reasoning(client: openai.OpenAI, llm: LLM) -> None:
    named: Any = {"type": "function", "function": {"name": "other"}}
    asked: dict[str, Any] = {"tools": [tool(), tool("other", SCHEMA)], "tool_choice": named}
    end = {str(llm.tokenizer.controls["</think>"]): 100}
    for stream in (False, True):
        with babbling(llm, 2):
            answer = ask(client, {}, logit_bias=end, stream=stream, **asked)
            if stream:
                message, _ = added_up(answer)
                found = [(call["name"], json.loads(call["arguments"])) for call in message["calls"].values()]
            else:
                found = calls(answer.choices[0])
        ((name, arguments),) = found
        assert name == "other"
        jsonschema.validate(arguments, SCHEMA)


def test_strict_arguments_where_calls_are_free(client: openai.OpenAI, llm: LLM) -> None:
    """The words are dictated with as much weight as can be; the schema wins, from the mark on and not before."""
    wrong = block('<｜DSML｜invoke name="warmth">\n' + parameter("where", "x" * 40))
    for strict, begins in ((False, '{"where": "xxx'), (True, '{"city": "')):
        with dictated(llm, "I look." + wrong) as ids:
            choice = ask(client, tools=[tool(strict=strict)], max_tokens=len(ids) - 30).choices[0]
        assert choice.message.content == "I look."
        assert choice.message.tool_calls[0].function.arguments.startswith(begins)


def test_strict_lets_the_model_answer_in_words(client: openai.OpenAI, llm: LLM) -> None:
    with dictated(llm, "No need to < look.\n"):
        choice = ask(client, tools=[tool(strict=True)]).choices[0]
    assert choice.message.content == "No need to < look.\n"
    assert choice.finish_reason == "stop"


def test_tools_inside_messages_count(client: openai.OpenAI, llm: LLM) -> None:
    messages: Any = [{"role": "system", "content": "x", "tools": [tool()]}, *FRANCE]
    with babbling(llm, 4):
        choice = ask(client, messages=messages, tool_choice="required").choices[0]
    assert {name for name, _ in calls(choice)} == {"warmth"}


def test_a_schema_or_a_call(client: openai.OpenAI, llm: LLM) -> None:
    """With both on offer an answer is the one or the other, and with tool_choice none never a call."""
    kinds = set()
    for seed in range(8):
        with babbling(llm, seed):
            choice = ask(client, tools=[tool()], response_format=FORMAT).choices[0]
            silent = ask(client, tools=[tool()], response_format=FORMAT, tool_choice="none").choices[0]
        jsonschema.validate(json.loads(silent.message.content), SCHEMA)
        kinds.add(choice.finish_reason)
        jsonschema.validate(
            calls(choice)[0][1] if choice.message.tool_calls else json.loads(choice.message.content), SCHEMA
        )
    assert kinds == {"tool_calls", "stop"}


def test_the_prompt_states_the_schema_where_the_model_was_taught_that(server: Running, llm: LLM) -> None:
    sent = {"messages": FRANCE, "response_format": FORMAT}
    before = server.post("/tokenize", {"messages": FRANCE}).json()["tokens"]
    assert server.post("/tokenize", sent).json()["tokens"] == before  # the embedded model was not
    own = llm.dialect
    llm.dialect = replace(own, response_format="## Schema:\n{schema}")
    try:
        text = llm.tokenizer.decode(server.post("/tokenize", sent).json()["tokens"])
        assert f"## Schema:\n{json.dumps(SCHEMA)}<｜User｜>" in text
        any_object = sent | {"response_format": {"type": "json_object"}}
        assert server.post("/tokenize", any_object).json()["tokens"] == before
    finally:
        llm.dialect = own


NAMED = {"type": "function", "function": {"name": "nobody"}}
DEEP = json.loads('{"items":' * 160 + "{}" + "}" * 160)
OPEN = {"messages": [*FRANCE, {"role": "assistant", "content": "{"}], "continue_final_message": True}


def schema(asked: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": asked} | more}}


def structured(**asked: Any) -> dict[str, Any]:
    return {"structured_outputs": asked}


def system(*tools: Any) -> dict[str, Any]:
    return {"messages": [{"role": "system", "tools": list(tools)}, *FRANCE]}


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "wanted text, json_object or"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "wanted text, json_object or"),
        (schema({}, name=None), "response_format", "wanted text, json_object or"),
        (schema([]), "response_format", "wanted text, json_object or"),
        (schema({}, y=1), "response_format", "wanted text, json_object or"),
        (schema({}, strict="yes"), "response_format", "wanted text, json_object or"),
        (schema({"not": {}}, strict=True), "response_format", 'got Unimplemented keys: ["not"]'),
        (schema(DEEP), "response_format", "recursion limit"),
        (structured(regex="("), "structured_outputs", "unclosed group"),
        (structured(regex="a", choice=["b"]), "structured_outputs", "wanted one of json, json_object, regex"),
        (structured(ebnf="a"), "structured_outputs", "wanted one of json"),
        (structured(choice=[]), "structured_outputs", "a list of texts"),
        (structured(choice=[1]), "structured_outputs", "a list of texts"),
        (structured(json="{}"), "structured_outputs", "wanted one of json"),
        (structured(json={"$ref": "#"}), "structured_outputs", "one that no text satisfies"),
        (structured(choice=["a"]) | schema({}), "structured_outputs", "send one of them"),
        ({"guided_json": {}}, "guided_json", "send structured_outputs"),
        ({"guided_regex": "a"}, "guided_regex", "send structured_outputs"),
        ({"tool_choice": "required"}, "tool_choice", "got 'required'"),
        ({"tool_choice": "always", "tools": [tool()]}, "tool_choice", "got 'always'; wanted auto or none, or with"),
        ({"tool_choice": NAMED, "tools": [tool()]}, "tool_choice", "nobody"),
        ({"tools": [tool("f", {"minProperties": 1}, strict=True)]}, "tools", "tools: tool 'f': a call cannot be held"),
        ({"tools": [tool("f", {"properties": {"a": {"not": {}}}}, strict=True)]}, "tools", 'keys: ["not"]'),
        (system(tool("f", {"required": 5}, strict=True)), "tools", "wanted a JSON schema of an object"),
        (OPEN | schema({}), "continue_final_message", "only from its beginning"),
    ],
)
def test_what_cannot_be_had(server: Running, changes: Any, param: str, said: str) -> None:
    found = error(server.post(CHAT, {"messages": FRANCE, "max_tokens": 1} | OFF | changes))
    assert said in found["message"]
    assert (found["type"], found["param"]) == ("invalid_request_error", param)


def test_what_changes_nothing_needs_no_grammar(server: Running, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so not the library either."""
    monkeypatch.setattr(type(llm), "grammars", None)
    plain = {"messages": FRANCE, "max_tokens": 1} | OFF
    for changes in (
        {"response_format": {"type": "text"}, "structured_outputs": {}},
        {"tools": [tool()], "tool_choice": "auto"},
        {"tools": [tool(strict=False)]},
        {"tools": [tool(strict=True)], "tool_choice": "none"},
        {"tool_choice": "auto", "response_format": None},
    ):
        assert server.post(CHAT, plain | changes).status_code == 200


def test_an_answer_that_outgrows_its_grammar_is_an_error(server: Running, llm: LLM) -> None:
    many = {"structured_outputs": {"json": {"enum": [{"a": n} for n in range(4000)]}}, "max_tokens": 20}
    with babbling(llm, 1):
        found = error(server.post(CHAT, {"messages": FRANCE} | OFF | many))
    assert "became too complex" in found["message"]
    assert server.get("/health").status_code == 200
