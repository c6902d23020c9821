"""Anthropic's own client against /v1/messages: prompts counted, and what cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests import PICO
from tests.messages import (
    ASK,
    COUNT,
    MESSAGES,
    THINK,
    TOOLS,
    ask,
    client_of,
    refusal,
    streamed,
    total,
)
from tests.serving import FRANCE, Running, gated, running, slowly, until

if TYPE_CHECKING:
    import anthropic


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0))


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm, queue=0, body=20000) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> anthropic.Anthropic:
    return client_of(server)


# --- counting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"system": "Be brief."}, {"tools": TOOLS}, THINK])
def test_count_tokens_is_what_the_answer_will_say(client: anthropic.Anthropic, more: Any) -> None:
    """And the prompt has in it what was asked for: these differ from the plain one."""
    messages: Any = [{"role": "user", "content": f"{sorted(more)}?"}]
    counted = client.messages.count_tokens(model="pico", messages=messages, **more)
    assert counted.input_tokens == total(ask(client, messages=messages, max_tokens=1, **more).usage)
    plainly = client.messages.count_tokens(model="pico", messages=messages).input_tokens
    assert (counted.input_tokens > plainly) == bool({"system", "tools"} & set(more))


def test_what_was_there_already_is_counted_apart(client: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "A long way to go. " * 40}]
    counted = client.messages.count_tokens(model="pico", messages=messages).input_tokens
    first = ask(client, messages=messages, max_tokens=1).usage
    assert (first.input_tokens, first.cache_read_input_tokens) == (counted, 0)
    for again in (ask(client, messages=messages, max_tokens=1), streamed(client, messages=messages, max_tokens=1)):
        assert again.usage.cache_read_input_tokens > 0
        assert total(again.usage) == counted


def test_a_prompt_too_long_to_run_can_be_counted(server: Running, client: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "word " * 2000}]
    assert client.messages.count_tokens(model="pico", messages=messages).input_tokens > 1024
    refusal(server.post(MESSAGES, ASK | {"messages": messages}), 400, "invalid_request_error")


# --- refusals ----------------------------------------------------------------------------------------------------

PICTURE = {"type": "image", "source": {"type": "url", "url": "x"}}


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def past(*blocks: Any) -> dict[str, Any]:
    return {"messages": [*FRANCE, {"role": "assistant", "content": list(blocks)}, *FRANCE]}


USE = {"type": "tool_use", "id": "a", "name": "b", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}


def answered(*results: Any) -> dict[str, Any]:
    return {"messages": [*past(USE)["messages"][:2], {"role": "user", "content": list(results)}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 5000}, "do not fit into the context"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role; got 'system'; wanted user or assistant"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content; got 5"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
        (user(), "messages.0.content; got []; wanted at least one block"),
        ({"messages": [*FRANCE, *user()["messages"]]}, "messages.1.content; got []"),
        (user(PICTURE), "messages.0.content.0.type; got 'image'; wanted text: these models read text only"),
        (user({"type": "text"}), "messages.0.content.0.text; got None; wanted a text"),
        (answered({"type": "tool_result"}), "messages.2.content.0.tool_use_id; got None; wanted the id of a call"),
        (answered({"type": "tool_result", "tool_use_id": "b"}), "messages.2.content.0.tool_use_id; got 'b'"),
        (answered({"type": "tool_result", "tool_use_id": {}}), "messages.2.content.0.tool_use_id; got {}"),
        (user({"type": "tool_result", "tool_use_id": "a"}), "messages.0.content.0.tool_use_id; got 'a'"),
        (answered({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text"}]}), "0.content.0.text"),
        (
            past({"type": "tool_use", "id": "a", "name": "b", "input": "c"}),
            "content.0.input; got 'c'; wanted an object",
        ),
        (past({"type": "tool_use", "name": "b", "input": {}}), "messages.1.content.0.id"),
        (past({"type": "thinking"}), "messages.1.content.0.thinking"),
        ({"messages": past(USE)["messages"][:2]}, "messages.1; got no answer to 'a'; wanted a tool_result for each"),
        (past(USE), "messages.2; got no answer to 'a'; wanted a tool_result for each tool_use of the message before"),
        ({"messages": [*past(USE, USE | {"id": "c"})["messages"][:2], *user(RESULT)["messages"]]}, "no answer to 'c'"),
        ({"messages": [*past(USE)["messages"], *past()["messages"][1:]]}, "messages.2; got no answer to 'a'"),
        (past(USE, USE), "messages.1.content.1.id; got 'a'; wanted an id of its own for each tool_use"),
        (answered(RESULT, RESULT), "messages.2.content.1.tool_use_id; got 'a'; wanted one tool_result for each"),
        (
            {"messages": [*answered(RESULT)["messages"], *past()["messages"][1:2], *user(RESULT)["messages"]]},
            "messages.4.content.0.tool_use_id; got 'a'; wanted the id of a call that stands before it",
        ),
        ({"system": [PICTURE]}, "system.0.type; got 'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "this server brings no tools of its own"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema; got None; wanted an object"),
        ({"tools": [TOOLS[0] | {"input_examples": [{}]}]}, "tools.0.input_examples"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type; got 'some'; wanted auto, any, tool or none"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "on"}}, "thinking.type; got 'on'; wanted enabled, adaptive or disabled"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens; got None; wanted a whole number"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens; got 0"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        ({"output_config": {"tone": "mild"}}, "output_config.tone"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type; got 'xml'; wanted json_schema"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": -1}, "temperature; got -1"),
        ({"stop": "x"}, "'stop' is not supported"),
        ({"container": "x"}, "'container' is not supported"),
    ],
)
def test_what_cannot_be_had(server: Running, changes: Any, said: str) -> None:
    assert said in refusal(server.post(MESSAGES, ASK | changes), 400, "invalid_request_error")


def test_what_changes_nothing_is_taken(server: Running) -> None:
    """Marks for a cache, data about the user, what only Anthropic's servers can read, and fields that are null."""
    mark = {"cache_control": {"type": "ephemeral"}}
    hi = {"type": "text", "text": "Hi"}
    history = past({"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "Paris.", "citations": None})
    plainly = past({"type": "text", "text": "Paris."})
    tools = [TOOLS[0] | mark | {"type": "custom", "strict": None}]
    for sent, bare in (
        (history | mark | {"metadata": {"user_id": "x"}}, plainly),
        (user(hi | mark) | {"system": None, "tools": tools}, user(hi) | {"tools": TOOLS}),
    ):
        counts = [server.post(COUNT, {"model": "pico"} | asked).json()["input_tokens"] for asked in (sent, bare)]
        assert counts[0] == counts[1]
    assert server.post(MESSAGES, ASK | history | mark | {"metadata": {}, "service_tier": "auto"}).status_code == 200


def test_a_picture_in_a_result_is_told_to_the_model(server: Running) -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "content": [PICTURE]}
    text = {"type": "tool_result", "tool_use_id": "a", "content": "[Unsupported image]"}
    counts = [server.post(COUNT, answered(one)).json()["input_tokens"] for one in (result, text)]
    assert counts[0] == counts[1]


def test_errors_of_other_statuses(server: Running, client: anthropic.Anthropic) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError, match="there is no such model"):
        client.messages.create(model="other", **ASK)
    with pytest.raises(anthropic.RequestTooLargeError):
        ask(client, messages=[{"role": "user", "content": "x" * 30000}])
    with pytest.raises(anthropic.BadRequestError, match="no tools of its own"):
        ask(client, tools=[{"type": "bash_20250124", "name": "bash"}])
    refusal(server.post(COUNT, {"messages": FRANCE, "model": "other"}), 404, "not_found_error")
    refusal(server.get("/v1/messages/batches"), 404, "not_found_error")
    refusal(server.get(MESSAGES), 405, "invalid_request_error")
    refusal(server.post(MESSAGES, b"{}", content_type="text/plain"), 415, "invalid_request_error")
    refusal(server.post(COUNT, b"{"), 400, "invalid_request_error")
    assert "param" in server.post("/v1/chat/completions", {}).json()["error"]  # the others keep their shape


def test_a_full_queue(server: Running, client: anthropic.Anthropic, llm: LLM) -> None:
    import anthropic

    with gated(llm) as gate:
        with (
            client.messages.create(model="pico", stream=True, **ASK),
            client.messages.create(model="pico", stream=True, **ASK),
        ):
            with pytest.raises(anthropic.RateLimitError) as full:
                ask(client)
            assert "retry-after" in full.value.response.headers
            assert refusal(server.post(MESSAGES, ASK), 429, "rate_limit_error")
        gate.set()
    until(lambda: server.service.worker.live == 0)


def test_a_late_answer(server: Running, llm: LLM) -> None:
    with slowly(llm):
        assert refusal(server.post(MESSAGES, ASK | {"timeout": 0.01}), 504, "timeout_error")


def test_a_key_by_either_header(llm: LLM) -> None:
    import anthropic

    with running(llm, key="secret") as locked:
        assert client_of(locked, "secret").messages.count_tokens(model="pico", messages=FRANCE).input_tokens
        assert locked.post(COUNT, {"messages": FRANCE}, x_api_key="secret").status_code == 200
        assert locked.post(COUNT, {"messages": FRANCE}, authorization="Bearer secret").status_code == 200
        with pytest.raises(anthropic.AuthenticationError, match="x-api-key"):
            ask(client_of(locked, "other"))
        refusal(locked.post(MESSAGES, ASK), 401, "authentication_error")
        refusal(locked.post(MESSAGES, ASK, x_api_key="secre"), 401, "authentication_error")


def test_a_server_that_shuts_down(llm: LLM) -> None:
    import anthropic

    with running(llm) as server:
        server.service.worker.drain()
        with pytest.raises(anthropic.APIStatusError) as gone:
            ask(client_of(server))
        assert gone.value.status_code == 503
        refusal(server.post(MESSAGES, ASK), 503, "overloaded_error")
