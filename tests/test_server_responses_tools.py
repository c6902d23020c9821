"""OpenAI's own client against /v1/responses: calls there and back, and logprobs.

What the embedded model would not say is dictated.
"""

from __future__ import annotations

from typing import Any

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
    LOGPROBS,
    SAID,
    TOOLS,
    Plan,
    ask,
    both,
    kinds,
    spelt,
)
from tests.serving import Running, dictated
from tests.test_server_tools import ARGUMENTS, BOTH, PARIS, block, invoke, parameter


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0))


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


@pytest.mark.parametrize("more", [pytest.param({}, marks=pytest.mark.slow), DRY])
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
