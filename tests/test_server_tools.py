"""Tool calls on the wire. The embedded model makes none, so its words are dictated; all else is the real way."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests import PICO
from tests.serving import OFF, Running, dictated

ASK = [{"role": "user", "content": "How warm is it in Paris and in Rome?"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "warmth", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]


def parameter(name: str, value: str, string: bool = True) -> str:
    return f'<｜DSML｜parameter name="{name}" string="{str(string).lower()}">{value}</｜DSML｜parameter>\n'


def invoke(*parameters: str) -> str:
    return f'<｜DSML｜invoke name="warmth">\n{"".join(parameters)}</｜DSML｜invoke>\n'


def block(*calls: str) -> str:
    return f"\n\n<｜DSML｜tool_calls>\n{''.join(calls)}</｜DSML｜tool_calls>"


PARIS, ROME = invoke(parameter("city", "Paris")), invoke(parameter("city", "Rome"), parameter("days", "[1, 2]", False))
BOTH = "I look it up." + block(PARIS, ROME)
ARGUMENTS = ['{"city": "Paris"}', '{"city": "Rome", "days": [1, 2]}']


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0, reuse_points=0))


def ask(client: openai.OpenAI, extra: Any = OFF, **asked: Any) -> Any:
    given: dict[str, Any] = {"tools": TOOLS, "messages": ASK} | asked
    return client.chat.completions.create(model="pico", extra_body=extra, **given)


def added_up(stream: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The message of a stream as a client puts it together, and its chunks as JSON."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}}
    chunks = [chunk.model_dump(exclude_unset=True) for chunk in stream]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning") or ""
        message |= {name: choice[name] for name in ("finish_reason", "unparsed") if choice.get(name)}
        for part in delta.get("tool_calls", ()):
            call = message["calls"].setdefault(part["index"], {"arguments": ""})
            call |= {name: part[name] for name in ("id", "type") if name in part}
            call |= {"name": part["function"]["name"]} if "name" in part["function"] else {}
            call["arguments"] += part["function"]["arguments"]
    return message, chunks


def test_parallel_calls_behind_text(client: openai.OpenAI, llm: LLM) -> None:
    with dictated(llm, BOTH) as ids:
        answer = ask(client)
        (choice,) = answer.choices
    assert choice.message.content == "I look it up."
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert [call.function.arguments for call in calls] == ARGUMENTS
    assert {call.function.name for call in calls} == {"warmth"}
    assert len({call.id for call in calls}) == 2
    assert answer.usage.completion_tokens == len(ids)
    assert not hasattr(choice, "unparsed")


def test_calls_stream_as_they_come(client: openai.OpenAI, llm: LLM) -> None:
    """Names first, a text argument token by token; the same message as without a stream."""
    long = "a long city name " * 3
    with dictated(llm, "Well." + block(invoke(parameter("city", long)), PARIS)):
        message, chunks = added_up(ask(client, stream=True))
        whole = ask(client).choices[0]
    assert message["content"] == whole.message.content == "Well."
    assert message["finish_reason"] == whole.finish_reason == "tool_calls"
    found = [call["arguments"] for _, call in sorted(message["calls"].items())]
    assert found == [call.function.arguments for call in whole.message.tool_calls]
    assert json.loads(found[0]) == {"city": long}
    parts = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert [part["function"]["name"] for part in parts if "name" in part["function"]] == ["warmth", "warmth"]
    assert sum(part["index"] == 0 for part in parts) > 8  # not in one piece at the end
    assert all(("id" in part) == ("name" in part["function"]) for part in parts)


def test_a_call_behind_reasoning(client: openai.OpenAI, llm: LLM) -> None:
    with dictated(llm, "I must look.</think>" + BOTH):
        whole = ask(client, {}).choices[0]
        message, _ = added_up(ask(client, {}, stream=True))
    assert whole.message.reasoning == message["reasoning"] == "I must look."
    assert whole.message.content == message["content"] == "I look it up."
    assert len(whole.message.tool_calls) == len(message["calls"]) == 2


@pytest.mark.parametrize("cut", ["Rom", '"city" string="true">'])
def test_a_call_cut_by_max_tokens_is_kept_and_marked(client: openai.OpenAI, llm: LLM, cut: str) -> None:
    """The whole first call, what came of the second, and finish_reason length: not to be executed."""
    text = BOTH[: BOTH.rindex(cut) + len(cut)]
    limit = len(llm.tokenizer.encode_raw(text))
    with dictated(llm, BOTH):
        whole = ask(client, max_tokens=limit).choices[0]
        message, _ = added_up(ask(client, max_tokens=limit, stream=True))
    assert whole.finish_reason == message["finish_reason"] == "length"
    first, second = whole.message.tool_calls
    assert first.function.arguments == ARGUMENTS[0]
    assert ARGUMENTS[1].startswith(second.function.arguments)
    assert not second.function.arguments.endswith("}")
    assert [call["arguments"] for call in message["calls"].values()] == [c.function.arguments for c in (first, second)]
    assert whole.unparsed == message["unparsed"]
    assert whole.unparsed["problems"] == ["the output ended inside a tool call"]


def test_one_call_if_parallel_calls_are_not_wanted(client: openai.OpenAI, llm: LLM) -> None:
    with dictated(llm, BOTH):
        whole = ask(client, parallel_tool_calls=False).choices[0]
        message, _ = added_up(ask(client, parallel_tool_calls=False, stream=True))
    assert [call.function.arguments for call in whole.message.tool_calls] == ARGUMENTS[:1]
    assert [call["arguments"] for call in message["calls"].values()] == ARGUMENTS[:1]
    assert whole.finish_reason == message["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("asked", [{"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}])
def test_markup_never_leaks_where_no_call_was_offered(client: openai.OpenAI, llm: LLM, asked: Any) -> None:
    with dictated(llm, BOTH):
        whole = ask(client, **asked).choices[0]
        message, _ = added_up(ask(client, stream=True, **asked))
    assert whole.message.content == message["content"] == "I look it up."
    assert not whole.message.tool_calls
    assert not message["calls"]
    assert whole.unparsed == message["unparsed"]
    assert "no tools were offered" in whole.unparsed["problems"][0]
    assert whole.unparsed["text"] == BOTH.removeprefix("I look it up.")


def test_with_tool_choice_none_the_model_does_not_hear_of_tools(client: openai.OpenAI) -> None:
    without = ask(client, tools=openai.NOT_GIVEN, max_tokens=1).usage.prompt_tokens
    assert ask(client, tool_choice="none", max_tokens=1).usage.prompt_tokens == without
    assert ask(client, tool_choice="auto", max_tokens=1).usage.prompt_tokens > without


def test_a_replayed_call_is_the_ids_that_were_sampled(server: Running, client: openai.OpenAI, llm: LLM) -> None:
    """The client sends reasoning and calls back with their results: the next prompt begins with what was said."""
    with dictated(llm, "I must look.</think>" + BOTH) as ids:
        message = ask(client, {}).choices[0].message
    replayed = message.model_dump(exclude_none=True)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "warm"} for call in message.tool_calls]
    sent = {"messages": [*ASK, replayed, *results], "tools": TOOLS}
    before = server.post("/tokenize", {"messages": ASK, "tools": TOOLS}).json()["tokens"]
    after = server.post("/tokenize", sent).json()["tokens"]
    assert after[: len(before) + len(ids)] == before + ids
    assert llm.tokenizer.decode(after[len(before) + len(ids) :]).count("<tool_result>warm</tool_result>") == 2


def test_results_take_the_order_of_their_calls(server: Running, llm: LLM) -> None:
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for n in range(2)]
    results = [{"role": "tool", "tool_call_id": f"c{n}", "content": f"result {n}"} for n in (1, 0)]
    sent = {"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": calls}, *results]}
    text = llm.tokenizer.decode(server.post("/tokenize", sent).json()["tokens"])
    assert text.index("result 0") < text.index("result 1")
