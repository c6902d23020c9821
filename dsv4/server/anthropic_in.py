"""Anthropic's bodies, read and said again as chats: from there on there is one road.

What would change the answer and cannot be had is refused here by its place in the body. Blocks that carry nothing for
this model are taken and left out: redacted thinking, signatures, marks for a cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Annotated, Any

from pydantic import Field

from dsv4.server.fields import Json, as_blocks, need_answers, need_call, of, only, wrong
from dsv4.server.schema import ChatRequest, Count, Number, Seed, Sent, StopText

SAME = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stream")  # mean what they mean in a chat


class CountRequest(Sent):
    """`POST /v1/messages/count_tokens`: all that decides the prompt."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None  # a hint at speed


class MessagesRequest(CountRequest):
    """`POST /v1/messages`. `seed` and `timeout` are not Anthropic's and mean what they mean in a chat."""

    max_tokens: Count
    stop_sequences: Annotated[list[StopText], Field(max_length=16)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    timeout: Annotated[Number, Field(gt=0)] | None = None


def chat_request(asked: CountRequest) -> ChatRequest:
    """The chat that asks for the same. Refusal for what no chat can say."""
    choice, one = _tool_choice(asked.tool_choice)
    said: Json = {"model": asked.model, "tool_choice": choice, "parallel_tool_calls": False if one else None}
    said["messages"] = [*_system(asked.system), *_messages(asked.messages)]
    last = said["messages"][-1]
    said["continue_final_message"] = last["role"] == "assistant"
    said["tools"] = [_tool(f"tools.{n}", tool) for n, tool in enumerate(asked.tools or ())] or None
    said["thinking"] = {"type": _thinking(asked.thinking)}
    said |= _output(asked.output_config)
    if isinstance(asked, MessagesRequest):
        said |= {name: getattr(asked, name) for name in SAME} | {"stop": asked.stop_sequences}
    return ChatRequest(**said)


# --- messages ----------------------------------------------------------------------------------------------------


def _system(given: str | list[Json] | None) -> list[Json]:
    parts = [_text(f"system.{n}", block) for n, block in enumerate(as_blocks("system", given or []))]
    return [{"role": "system", "content": parts}] if parts else []


def _messages(given: Iterable[Json]) -> Iterable[Json]:
    before = ""
    calls: dict[str, bool] = {}  # of the model's last turn, and whether they were answered
    for n, message in enumerate(given):
        where, role = f"messages.{n}", message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise wrong(f"{where}.role", role, " or ".join(ROLES), "say in system what no user says")
        only(where, message, "role", "content", "cache_control")
        blocks = as_blocks(f"{where}.content", message.get("content"))
        if role != before == "user":
            _end(n - 1, calls)
            calls = {}
        for place, block in enumerate(blocks):
            _check_call(f"{where}.content.{place}", role, block, calls)
        yield from ROLES[role](f"{where}.content", blocks)
        before = role
    _end(n, calls)


def _check_call(where: str, role: str, block: Json, calls: dict[str, bool]) -> None:
    """A call has an id of its own, a result is the only one of a call that stands before it."""
    kind = block.get("type")
    if kind == "tool_use" and role == "assistant":
        id = of(where, block, "id", str)
        if id in calls:
            raise wrong(f"{where}.id", id, "an id of its own for each tool_use")
        calls[id] = False
    elif kind == "tool_result":
        id = need_call(f"{where}.tool_use_id", block.get("tool_use_id"), calls)
        if calls[id]:
            raise wrong(f"{where}.tool_use_id", id, "one tool_result for each tool_use", "send one of them")
        calls[id] = True


def _end(n: int, calls: dict[str, bool]) -> None:
    """The user's turn ends with this message."""
    unanswered = [id for id, answered in calls.items() if not answered]
    need_answers(f"messages.{n}", unanswered, "a tool_result for each tool_use of the message before")


def _text(where: str, block: Json) -> Json:
    if block.get("type") != "text":
        raise wrong(f"{where}.type", block.get("type"), "text: these models read text only")
    return {"type": "text", "text": of(where, block, "text", str)}


def _user(where: str, blocks: list[Json]) -> Iterable[Json]:
    """Results become messages of their own, in their places; texts side by side stay together.

    Of no blocks no message would come, and the conversation would be another than the one that was sent.
    """
    if not blocks:
        raise wrong(where, blocks, "at least one block")
    placed = [(f"{where}.{n}", block) for n, block in enumerate(blocks)]
    for is_result, some in groupby(placed, lambda item: item[1].get("type") == "tool_result"):
        if is_result:
            yield from (_result(*item) for item in some)
        else:
            yield {"role": "user", "content": [_text(*item) for item in some]}


def _result(where: str, block: Json) -> Json:
    """What a tool gave. That it failed (is_error) has to be said in it: the model knows no other way."""
    parts = as_blocks(f"{where}.content", block.get("content") or "")
    for n, part in enumerate(parts):
        if part.get("type") == "text":
            of(f"{where}.content.{n}", part, "text", str)
    return {"role": "tool", "tool_call_id": of(where, block, "tool_use_id", str), "content": parts}


def _assistant(where: str, blocks: list[Json]) -> Iterable[Json]:
    """One message. What the model said in several blocks was one text, so nothing is put between them."""
    said: Json = {"reasoning_content": "", "content": "", "tool_calls": []}
    for n, block in enumerate(blocks):
        at, kind = f"{where}.{n}", block.get("type")
        if kind == "thinking":
            said["reasoning_content"] += of(at, block, "thinking", str)
        elif kind == "tool_use":
            said["tool_calls"].append(_use(at, block))
        elif kind != "redacted_thinking":
            said["content"] += _text(at, block)["text"]
    yield {"role": "assistant"} | said


def _use(where: str, block: Json) -> Json:
    arguments = json.dumps(of(where, block, "input", dict), ensure_ascii=False)
    function = {"name": of(where, block, "name", str), "arguments": arguments}
    return {"id": of(where, block, "id", str), "type": "function", "function": function}


ROLES: dict[str, Callable[[str, list[Json]], Iterable[Json]]] = {"user": _user, "assistant": _assistant}


# --- how to answer -----------------------------------------------------------------------------------------------


def _tool(where: str, given: Json) -> Json:
    """A tool of the client's. Those that Anthropic's servers run, or its models were taught, are not here."""
    if given.get("type") not in (None, "custom"):
        wanted = "custom: this server brings no tools of its own"
        raise wrong(f"{where}.type", given["type"], wanted, "give it a name, a description and an input_schema")
    hints = ("cache_control", "eager_input_streaming")  # at speed
    only(where, given, "type", "name", "description", "input_schema", "strict", *hints)
    function: Json = {"name": of(where, given, "name", str)}
    if given.get("description") is not None:
        function["description"] = of(where, given, "description", str)
    function["parameters"] = of(where, given, "input_schema", dict)
    return {"type": "function", "function": function | ({"strict": True} if given.get("strict") is True else {})}


def _tool_choice(given: Json | None) -> tuple[str | Json | None, bool]:
    """As a chat has it, and whether one call is enough."""
    if given is None:
        return None, False
    only("tool_choice", given, "type", "name", "disable_parallel_tool_use")
    one = given.get("disable_parallel_tool_use") is True
    match given.get("type"):
        case "tool":
            return {"type": "function", "function": {"name": of("tool_choice", given, "name", str)}}, one
        case "auto" | "none" as same:
            return str(same), one
        case "any":
            return "required", one
    raise wrong("tool_choice.type", given.get("type"), "auto, any, tool or none")


def _thinking(given: Json | None) -> str:
    """A chat's word for it. Without a word there is none, as these clients expect; a budget is a hint, not a limit."""
    if given is None:
        return "disabled"
    only("thinking", given, "type", "budget_tokens", "display")
    kind = given.get("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise wrong("thinking.type", kind, "enabled, adaptive or disabled")
    if kind == "enabled" and of("thinking", given, "budget_tokens", int) < 1:
        raise wrong("thinking.budget_tokens", given["budget_tokens"], "at least 1")
    if given.get("display") not in (None, "summarized"):
        raise wrong("thinking.display", given["display"], "summarized, or no such field", "leave it out")
    return "disabled" if kind == "disabled" else "enabled"


def _output(given: Json | None) -> Json:
    given = given or {}
    only("output_config", given, "effort", "format")
    said: Json = {}
    if given.get("effort") is not None:
        said["reasoning_effort"] = of("output_config", given, "effort", str)
    if given.get("format") is not None:
        form = of("output_config", given, "format", dict)
        if form.get("type") != "json_schema":
            raise wrong("output_config.format.type", form.get("type"), "json_schema")
        schema = {"name": "output", "schema": of("output_config.format", form, "schema", dict), "strict": True}
        said["response_format"] = {"type": "json_schema", "json_schema": schema}
    return said
