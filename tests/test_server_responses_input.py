"""What /v1/responses takes: items as turns of a chat, and what it refuses, each by its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from dsv4.server.job import chat_prompt
from dsv4.server.responses_in import ResponsesRequest, chat_request
from tests import PICO
from tests.responses import DRY, FRANCE, PATH, SAID, TOOLS
from tests.serving import Running, changed, dictated, gated, named_events, running, slowly, until
from tests.test_server_refusals import error

ASK: dict[str, Any] = {"input": FRANCE, "max_output_tokens": 40, "temperature": 0, **DRY}
USER = {"role": "user", "content": FRANCE}
CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "x"}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0, reuse_points=0))


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm, queue=0, body=20000) as server:
        yield server


# --- items -------------------------------------------------------------------------------------------------------


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": one} for one in texts]


def said(content: str = "", reasoning: str = "", *calls: str) -> dict[str, Any]:
    made = [{"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in calls]
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": made}


RESULT = {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "x"}]}


def answer(*texts: str) -> dict[str, Any]:
    parts = [{"type": "output_text", "text": one, "annotations": [], "logprobs": []} for one in texts]
    return {"type": "message", "id": "m", "status": "completed", "role": "assistant", "content": parts}


def thought(content: Any = None, summary: Any = (), **more: Any) -> dict[str, Any]:
    parts = content and [{"type": "reasoning_text", "text": one} for one in content]
    shown = [{"type": "summary_text", "text": one} for one in summary]
    return {"type": "reasoning", "id": "r", "summary": shown, "content": parts} | more


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([], []),
        ([{"role": "developer", "content": "Be kind."}, {"role": "system", "content": "Be brief."}],
         [{"role": "system", "content": text("Be kind.")}, {"role": "system", "content": text("Be brief.")}]),
        ([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": one} for one in "ab"]}],
         [{"role": "user", "content": text("a", "b")}]),
        ([USER, {"role": "assistant", "content": "Hi."}], [{"role": "user", "content": text(FRANCE)}, said("Hi.")]),
        ([thought(["So", " be it."]), answer("Yes", ".")], [said("Yes.", "So be it.")]),
        ([thought(summary=["One.", "Two."]), CALL, OUTPUT], [said("", "One.\n\nTwo.", "a"), RESULT]),
        ([thought(["It."], ["Shown."], encrypted_content="x")], [said("", "It.")]),
        ([thought(), thought(["A"]), thought(["B"])], [said("", "AB")]),
        ([thought(["A"]), answer("B"), thought(["C"]), answer("D")], [said("B", "A"), said("D", "C")]),
        ([answer("A"), answer("B")], [said("A"), said("B")]),
        ([answer("A"), CALL, CALL | {"call_id": "b"}, answer("B"), OUTPUT, OUTPUT | {"call_id": "b"}],
         [said("AB", "", "a", "b"), RESULT, RESULT | {"tool_call_id": "b"}]),
        ([CALL, OUTPUT, CALL | {"call_id": "b"}, OUTPUT | {"call_id": "b"}],
         [said("", "", "a"), RESULT, said("", "", "b"), RESULT | {"tool_call_id": "b"}]),
        ([CALL, USER, OUTPUT], [said("", "", "a"), {"role": "user", "content": text(FRANCE)}, RESULT]),
        ([CALL, OUTPUT | {"output": [{"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": "y"}]}],
         [said("", "", "a"), {"role": "tool", "tool_call_id": "a", "content": [*text("x"), {"type": "image"}]}]),
    ],
)  # fmt: skip
def test_items_are_turns_of_a_chat(items: Any, messages: Any) -> None:
    chat = chat_request(ResponsesRequest(input=[*items, USER], instructions="Look."))
    system, user = {"role": "system", "content": "Look."}, {"role": "user", "content": text(FRANCE)}
    assert chat.messages == [system, *messages, user]


def test_a_text_is_what_the_user_says() -> None:
    assert chat_request(ResponsesRequest(input="Hi.")).messages == [{"role": "user", "content": "Hi."}]


@pytest.mark.parametrize("tools", [TOOLS, []])
def test_what_was_sampled_is_what_is_read_again(server: Running, llm: LLM, tools: Any) -> None:
    """To the last id, reasoning where it stays and the answer where it goes; but not if anything was changed."""
    asked = {"input": FRANCE, "tools": tools}
    begin, words = ids(server, llm, **asked), SAID if tools else "So<b>. </think>Paris  it is."
    before = [*llm.tokenizer.encode_raw(words), llm.tokenizer.eos_id]
    odd = [token for letter in words.partition("</think>")[2] for token in llm.tokenizer.encode_raw(letter)]
    with dictated(llm, words) as sampled:
        if not tools:  # as no tokeniser would write it
            sampled[sampled.index(llm.tokenizer.controls["</think>"]) + 1 :] = [*odd, llm.tokenizer.eos_id]
        given = server.post(PATH, asked).json()
    assert (sampled == before) == bool(tools)
    kept = sampled if tools else [*odd, llm.tokenizer.eos_id]
    made = [item["call_id"] for item in given["output"] if item["type"] == "function_call"]
    talk = [USER, *given["output"], *(OUTPUT | {"call_id": one} for one in made), USER]
    found = ids(server, llm, input=talk, tools=tools)
    head = begin if tools else [*begin[:-1], llm.tokenizer.controls["</think>"]]
    assert found[: len(head) + len(kept)] == head + kept
    next(item for item in talk if item.get("type") == "message")["content"][0]["text"] += "!"
    assert ids(server, llm, input=talk, tools=tools)[: len(head) + len(kept)] != head + kept


def ids(server: Running, llm: LLM, **asked: Any) -> list[int]:
    """What the model reads."""
    return list(chat_prompt(chat_request(ResponsesRequest(**asked)), llm, server.service.said)[1])


# --- refusals ----------------------------------------------------------------------------------------------------

PICTURE = {"type": "input_image", "image_url": "x"}
WARMTH = {"type": "function", "name": "warmth"}
ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": [WARMTH]}
STRICT = {"type": "json_schema", "name": "x", "schema": {"if": {}}, "strict": True}


def user(*parts: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("changes", "param", "wanted"),
    [
        ({"input": None}, "input", "input: "),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [5]}, "input", "input: "),
        ({"input": [{"role": "tool", "content": "x"}]}, "input", "input.0.role; got 'tool'; wanted user, assistant"),
        ({"input": [{"role": "user"}]}, "input", "input.0.content; got None"),
        ({"input": [USER | {"name": "x"}]}, "input", "input.0.name"),
        (user(PICTURE), "input", "input.0.content.0.type; got 'input_image'; wanted input_text or output_text: these"),
        (user({"type": "input_text"}), "input", "input.0.content.0.text; got None; wanted a text"),
        ({"input": [USER, {"type": "item_reference", "id": "x"}]}, "input", "input.1.type; got 'item_reference'"),
        ({"input": [{"type": ["message"]}]}, "input", "input.0.type; got ['message']"),
        ({"input": [CALL | {"arguments": {}}, OUTPUT]}, "input", "input.0.arguments; got {}; wanted a text"),
        ({"input": [CALL | {"call_id": None}, OUTPUT]}, "input", "input.0.call_id"),
        ({"input": [CALL | {"namespace": "x"}, OUTPUT]}, "input", "input.0.namespace"),
        ({"input": [CALL, OUTPUT | {"output": None}]}, "input", "input.1.output"),
        ({"input": [CALL, OUTPUT | {"output": [{}]}]}, "input", "input.1.output.0.type"),
        ({"input": [CALL, OUTPUT | {"call_id": 5}]}, "input", "input.1.call_id; got 5"),
        ({"input": [CALL, OUTPUT | {"call_id": "b"}]}, "input", "input.1.call_id; got 'b'; wanted the id of a call"),
        ({"input": [OUTPUT, CALL, USER]}, "input", "input.0.call_id; got 'a'; wanted the id of a call"),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, None, "tools; got 2 of the name 'f'; wanted a name"),
        ({"input": [thought(encrypted_content="x"), USER]}, "input", "input.0.encrypted_content; got 'encrypted"),
        ({"input": [thought() | {"content": [{}]}, USER]}, "input", "input.0.content.0.text"),
        ({"input": [USER, answer("A")]}, "input", "a turn of the model at its end"),
        ({"input": [USER, CALL]}, "input", "input; got no answer to 'a'; wanted a function_call_output for each"),
        ({"input": [CALL, CALL | {"call_id": "b"}, OUTPUT, USER]}, "input", "no answer to 'b'"),
        ({"input": [USER, {"role": "developer", "content": "x"}]}, None, "leaves the model no turn"),
        ({"instructions": ["x"]}, "instructions", "valid string"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools.0.type; got 'web_search'; wanted function: this server"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools", "brings no tools of its own"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools.0.function"),
        ({"tools": [{"type": "function"}]}, "tools", "tools.0.name; got None; wanted a text"),
        ({"tools": [WARMTH | {"parameters": []}]}, "tools", "tools.0.parameters; got []; wanted an object"),
        ({"tools": [WARMTH | {"strict": "yes"}]}, "tools", "tools.0.strict; got 'yes'; wanted true or false"),
        ({"tools": [WARMTH | {"defer_loading": True}]}, "tools", "tools.0.defer_loading"),
        ({"tools": [WARMTH | {"strict": True, "parameters": {"if": {}}}]}, "tools", "tools: "),
        ({"tool_choice": "required"}, "tool_choice", "wanted auto or none, or with tools required"),
        ({"tool_choice": WARMTH}, "tool_choice", "tool_choice; got"),
        ({"tool_choice": "any", "tools": TOOLS}, "tool_choice", "got 'any'"),
        ({"tool_choice": WARMTH | {"name": "cold"}, "tools": TOOLS}, "tool_choice", "got {'type': 'function', "),
        ({"tool_choice": {"type": "file_search"}, "tools": TOOLS}, "tool_choice", "tool_choice"),
        ({"tool_choice": ALLOWED | {"tools": []}, "tools": TOOLS}, "tool_choice", "allowed_tools of such ones"),
        ({"tool_choice": ALLOWED | {"tools": [WARMTH, {}]}, "tools": TOOLS}, "tool_choice", "of such ones"),
        ({"tool_choice": ALLOWED | {"mode": "none"}, "tools": TOOLS}, "tool_choice", "of such ones"),
        ({"text": {"verbosity": "low"}}, "text", "text.verbosity; got 'low'; wanted medium"),
        ({"text": {"tone": "mild"}}, "text", "text.tone"),
        ({"text": {"format": "json"}}, "text", "text.format; got 'json'; wanted an object"),
        ({"text": {"format": {"type": "xml"}}}, "text", "text.format.type; got 'xml'; wanted text, json_object"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "text.format.schema"),
        ({"text": {"format": STRICT}}, "text", "text: "),
        ({"reasoning": {"effort": 5}}, "reasoning", "reasoning.effort; got 5; wanted none or high"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "reasoning.effort; got 'low'; wanted none or high"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning", "reasoning.summary; got 'detailed'; wanted auto"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning", "reasoning.context"),
        ({"reasoning": {"budget": 5}}, "reasoning", "reasoning.budget"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "reasoning is not encrypted but comes as text"),
        ({"include": ["web_search_call.results"]}, "include", "there are no hosted tools"),
        ({"top_logprobs": 2}, "top_logprobs", '"message.output_text.logprobs" in include'),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "and max_output_tokens 5000; wanted max_output_tokens"),
        ({"temperature": -1}, "temperature", "temperature; got -1"),
        ({"metadata": {"a": 5}}, "metadata", "valid string"),
        ({"previous_response_id": "x"}, "previous_response_id", "send all that was said so far as input: this server"),
        ({"conversation": "x"}, "conversation", "send all that was said so far as input: this server keeps nothing"),
        ({"background": True}, "background", "wanted False, or no such field"),
        ({"truncation": "auto"}, "truncation", "wanted 'disabled', or no such field"),
        ({"prompt": {"id": "x"}}, "prompt", "'prompt' is not supported"),
        ({"max_tokens": 5}, "max_tokens", "'max_tokens' is not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "include_obfuscation"),
    ],
)  # fmt: skip
def test_what_cannot_be_had(server: Running, changes: Any, param: str | None, wanted: str) -> None:
    found = error(server.post(PATH, ASK | changes))
    assert wanted in found["message"]
    assert (found["type"], found["param"]) == ("invalid_request_error", param)


def test_what_changes_nothing_is_taken(server: Running) -> None:
    more = {"include": [], "stream_options": {"include_obfuscation": False}, "text": {"verbosity": "medium"}}
    more |= {"reasoning": DRY["reasoning"] | {"summary": "auto"}, "previous_response_id": None, "tools": []}
    assert server.post(PATH, ASK | more | {"max_output_tokens": 1}).status_code == 200


def test_errors_of_other_statuses(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no such model") as lost:
        client.responses.create(model="other", input=FRANCE)
    assert lost.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="this server keeps nothing") as bad:
        client.responses.create(model="pico", input=FRANCE, previous_response_id="resp_1", stream=True)
    assert bad.value.param == "previous_response_id"
    assert error(server.post(PATH, ASK | {"input": "x" * 30000}), 413)["code"] == "body_too_large"
    assert error(server.post(PATH, b"{}", content_type="text/plain"), 415)
    for sent in (b"{", b"[]", b'{"input": "\\ud800"}', b'{"input": [{"role": "user", "content": "\\ud800"}]}'):
        assert error(server.post(PATH, sent), 400)
    assert error(server.get(f"{PATH}/resp_1"), 404)
    assert error(server.get(PATH), 405)


def test_a_full_queue(server: Running, client: openai.OpenAI, llm: LLM) -> None:
    asked: dict[str, Any] = {"model": "pico", "input": FRANCE, "stream": True}
    with gated(llm) as gate:
        with client.responses.create(**asked), client.responses.create(**asked):
            assert "retry-after" in server.post(PATH, ASK).headers
            with pytest.raises(openai.RateLimitError):
                client.responses.create(**asked)
        gate.set()
    until(lambda: server.service.worker.live == 0)


def test_a_late_answer(server: Running, llm: LLM) -> None:
    with slowly(llm):
        assert error(server.post(PATH, ASK | {"timeout": 0.01}), 504)["code"] == "deadline_exceeded"


@pytest.mark.parametrize("good", [0, 2])
def test_an_error_in_a_stream_is_its_end(server: Running, client: openai.OpenAI, llm: LLM, good: int) -> None:
    """Logits that are no numbers, from the beginning or behind some good ones."""
    with changed(llm, lambda work, logits: logits * (float("nan") if len(work.request.output) >= good else 1)):
        events = named_events(server, PATH, ASK)
        assert error(server.post(PATH, ASK), 500)["code"] == "not_finite"
        last = list(client.responses.create(model="pico", input=FRANCE, stream=True))[-1]
    assert [kind for kind, _ in events] == [
        "response.created", "response.in_progress",
        *["response.output_item.added", "response.content_part.added"] * bool(good),
        *["response.output_text.delta"] * good,
        "response.failed",
    ]  # fmt: skip
    for n, (_, event) in enumerate(events):
        assert event["sequence_number"] == n
    failed = Response.model_validate(events[-1][1]["response"])
    assert failed.error is not None
    assert failed.error.code == "server_error"
    assert "not finite" in failed.error.message
    assert [(item.type, item.status) for item in failed.output] == [("message", "incomplete")] * bool(good)
    assert failed.output_text == "The capital"[: 11 * bool(good)]
    assert (last.type, failed.status) == ("response.failed", "failed")


def test_a_client_that_leaves_ends_its_request(server: Running, client: openai.OpenAI, llm: LLM) -> None:
    before = server.ended("cancelled")
    with gated(llm) as gate:
        with client.responses.create(model="pico", input=FRANCE, stream=True) as stream:
            next(iter(stream))
        until(lambda: server.ended("cancelled") == before + 1)
        gate.set()
    until(lambda: server.service.worker.live == 0)
