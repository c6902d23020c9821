"""OpenAI's responses, read and said again as chats: from there on there is one road.

Nothing is kept, so the input is the whole conversation. Its items are smaller than messages: what the model said in one
turn (reasoning, text, calls) becomes one message again. Names of items and fields that this server gave them, and marks
of how far they came, tell the model nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dsv4.llm import LLM
from dsv4.server.fields import Json, as_blocks, need_answers, need_call, of, only, wrong
from dsv4.server.job import Job, chat_job
from dsv4.server.refusal import Refusal
from dsv4.server.said import Said
from dsv4.server.schema import ChatRequest, Count, Number, Seed, Sent

SAME = ("model", "temperature", "top_p", "parallel_tool_calls", "seed", "stream")  # mean what they mean in a chat
NAMES = {"max_tokens": "max_output_tokens", "response_format": "text"}  # a chat's, and what they are called here
LOGPROBS = "message.output_text.logprobs"
# An item goes on with the turn of the model if one of these stands right before it.
GOES_ON = {
    "reasoning": ("reasoning",),
    "assistant": ("reasoning", "function_call"),
    "function_call": ("reasoning", "assistant", "function_call"),
}
# Other items, and the roles that a chat has for them. A developer here gives instructions for good; a chat's, which is
# the one that these models were taught, takes turns as users do, and is forgotten with them.
ROLES = {"user": "user", "system": "system", "developer": "system", "function_call_output": "tool"}
# How to reason, otherwise than by effort: what leaves it as it is.
AS_IT_IS = {"summary": "auto", "generate_summary": "auto", "context": "auto", "mode": "standard"}


class ResponsesRequest(Sent):
    """`POST /v1/responses`. `seed` and `timeout` are not OpenAI's there and mean what they mean in a chat."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_output_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    metadata: dict[str, str] | None = None  # given back
    stream: bool | None = None
    stream_options: dict[Literal["include_obfuscation"], bool] | None = None  # it asks for padding of a wire
    seed: Seed | None = None
    timeout: Annotated[Number, Field(gt=0)] | None = None


def response_job(asked: ResponsesRequest, llm: LLM, said: Said | None = None) -> Job:
    """The job of the chat that asks for the same. What that refuses is named as it is called here."""
    effort, efforts = (asked.reasoning or {}).get("effort"), ("none", *llm.dialect.efforts)
    if effort is not None and effort not in efforts:
        raise wrong("reasoning.effort", effort, f"{' or '.join(efforts)}: those of this model")
    try:
        return chat_job(chat_request(asked), llm, said)
    except Refusal as error:
        if error.param not in NAMES:
            raise
        raise _renamed(error, error.param, NAMES[error.param]) from None


def _renamed(error: Refusal, old: str, new: str) -> Refusal:
    what, got, wanted = (str(some or "").replace(old, new) for some in (error.what, error.got, error.wanted))
    about = {"got": got or None, "wanted": wanted or None, "do": error.do}
    return Refusal(what, status=error.status, code=error.code, param=new, **about)  # type: ignore[arg-type]


def chat_request(asked: ResponsesRequest) -> ChatRequest:
    """The chat that asks for the same. Refusal for what no chat can say."""
    tools = [_tool(f"tools.{n}", tool) for n, tool in enumerate(asked.tools or ())]
    choice, offered = _tool_choice(asked.tool_choice, tools)
    said = {name: getattr(asked, name) for name in SAME} | {"max_tokens": asked.max_output_tokens}
    said |= {"tools": offered or None, "tool_choice": choice}
    said["messages"] = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    said["messages"] += _messages(asked.input)
    if said["messages"][-1]["role"] == "assistant":
        raise wrong(
            "input", "a turn of the model at its end", "behind it a message of the user or the output of a call"
        )
    return ChatRequest(**said, **_format(asked.text), **_effort(asked.reasoning), **_logprobs(asked))


# --- items -------------------------------------------------------------------------------------------------------


def _messages(given: str | list[Json]) -> list[Json]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    said: list[Json] = []
    calls: dict[str, bool] = {}  # and whether they were answered
    before = ""
    for n, item in enumerate(given):
        where, kind = f"input.{n}", _kind(f"input.{n}", item)
        if kind == "function_call":
            calls[of(where, item, "call_id", str)] = False
        elif kind == "function_call_output":
            calls[need_call(f"{where}.call_id", item.get("call_id"), calls)] = True
        if kind not in GOES_ON:
            said.append(_other(where, kind, item))
        else:
            if before not in GOES_ON[kind]:
                said.append({"role": "assistant", "reasoning_content": "", "content": "", "tool_calls": []})
            _go_on(where, kind, item, said[-1])
        before = kind
    unanswered = [call for call, answered in calls.items() if not answered]
    need_answers("input", unanswered, "a function_call_output for each function_call")
    return said


def _kind(where: str, item: Json) -> str:
    """Its type; of a message, which may leave it out, who says it."""
    kind, role = item.get("type") or "message", item.get("role")
    if kind == "message":
        if role not in ("user", "assistant", "system", "developer"):
            raise wrong(f"{where}.role", role, "user, assistant, system or developer")
        return str(role)
    if kind not in ("reasoning", "function_call", "function_call_output"):
        wanted = "message, reasoning, function_call or function_call_output: nothing is kept or done on this server"
        raise wrong(f"{where}.type", kind, wanted)
    return str(kind)


def _other(where: str, kind: str, item: Json) -> Json:
    """A message of somebody else, or what a tool gave."""
    if kind == "function_call_output":
        only(where, item, "type", "id", "status", "call_id", "output")
        parts = as_blocks(f"{where}.output", item.get("output"), "input_text")
        output = [_output(f"{where}.output.{n}", part) for n, part in enumerate(parts)]
        return {"role": "tool", "tool_call_id": of(where, item, "call_id", str), "content": output}
    return {"role": ROLES[kind], "content": [{"type": "text", "text": text} for text in _texts(where, item)]}


def _output(where: str, part: Json) -> Json:
    """The model is told of what it cannot see: a picture."""
    if part.get("type") == "input_text":
        return {"type": "text", "text": of(where, part, "text", str)}
    return {"type": of(where, part, "type", str).removeprefix("input_")}


def _texts(where: str, item: Json) -> list[str]:
    """A message's texts."""
    only(where, item, "type", "id", "status", "role", "content", "phase")
    texts = []
    for n, part in enumerate(as_blocks(f"{where}.content", item.get("content"), "input_text")):
        at, kind = f"{where}.content.{n}", part.get("type")
        if kind not in ("input_text", "output_text"):
            raise wrong(f"{at}.type", kind, "input_text or output_text: these models read text only")
        texts.append(of(at, part, "text", str))
    return texts


def _go_on(where: str, kind: str, item: Json, turn: Json) -> None:
    """Add what the model said. What it said in several texts was one, so nothing is put between them."""
    if kind == "reasoning":
        turn["reasoning_content"] += _reasoning(where, item)
    elif kind == "assistant":
        turn["content"] += "".join(_texts(where, item))
    else:
        only(where, item, "type", "id", "status", "call_id", "name", "arguments")
        function = {name: of(where, item, name, str) for name in ("name", "arguments")}
        turn["tool_calls"].append({"id": of(where, item, "call_id", str), "type": "function", "function": function})


def _reasoning(where: str, item: Json) -> str:
    """The reasoning itself, or the summary that another server made of it, but not what only that one can read."""
    only(where, item, "type", "id", "status", "summary", "content", "encrypted_content")
    found: dict[str, list[str]] = {}
    for name in ("content", "summary"):
        parts = as_blocks(f"{where}.{name}", item.get(name) or [])
        found[name] = [of(f"{where}.{name}.{n}", part, "text", str) for n, part in enumerate(parts)]
    text = "".join(found["content"]) or "\n\n".join(found["summary"])
    if item.get("encrypted_content") and not text:
        wanted = "content with the text of it: this server has no key"
        raise wrong(f"{where}.encrypted_content", "encrypted reasoning", wanted, "leave the item out")
    return text


# --- how to answer -----------------------------------------------------------------------------------------------


def _tool(where: str, given: Json) -> Json:
    """A function of the client's."""
    if given.get("type") != "function":
        wanted = "function: this server brings no tools of its own"
        raise wrong(f"{where}.type", given.get("type"), wanted, "give it a name, a description and parameters")
    only(where, given, "type", "name", "description", "parameters", "strict")
    function = {"name": of(where, given, "name", str)}
    for name, kind in (("description", str), ("parameters", dict), ("strict", bool)):
        if given.get(name) is not None:
            function[name] = of(where, given, name, kind)
    return {"type": "function", "function": function}


def _tool_choice(given: str | Json | None, tools: list[Json]) -> tuple[str | Json | None, list[Json]]:
    """As a chat has it, and the tools that the model hears of."""
    named = [{"type": "function", "name": tool["function"]["name"]} for tool in tools]
    match given:
        case None | "auto" | "none":
            return given, tools
        case "required" if tools:
            return given, tools
        case {"type": "function", "name": name} if given in named:
            return {"type": "function", "function": {"name": name}}, tools
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": [*allowed], **rest} if (
            allowed and not rest and all(one in named for one in allowed)
        ):
            return str(mode), [tool for tool, name in zip(tools, named, strict=True) if name in allowed]
    one = '{"type": "function", "name": one of them}'
    raise wrong("tool_choice", given, f"auto or none, or with tools required, {one}, or allowed_tools of such ones")


def _format(given: Json | None) -> Json:
    given = given or {}
    only("text", given, "format", "verbosity")
    if given.get("verbosity") not in (None, "medium"):
        raise wrong("text.verbosity", given["verbosity"], "medium, or no such field", "ask for brevity in instructions")
    form = {"type": "text"} if given.get("format") is None else of("text", given, "format", dict)
    kind = form.get("type")
    if kind == "json_schema":
        only("text.format", form, "type", "name", "schema", "strict", "description")
        inner = {"name": of("text.format", form, "name", str), "schema": of("text.format", form, "schema", dict)}
        if form.get("strict") is not None:
            inner["strict"] = of("text.format", form, "strict", bool)
        return {"response_format": {"type": kind, kind: inner}}
    if kind not in ("text", "json_object"):
        raise wrong("text.format.type", kind, "text, json_object or json_schema")
    only("text.format", form, "type")
    return {"response_format": {"type": kind}}


def _effort(given: Json | None) -> Json:
    given = given or {}
    only("reasoning", given, "effort", *AS_IT_IS)
    for name, value in AS_IT_IS.items():
        if given.get(name) not in (None, value):
            wanted = f"{value}, or no such field: reasoning comes as the model wrote it"
            raise wrong(f"reasoning.{name}", given[name], wanted, "leave it out")
    return {} if given.get("effort") is None else {"reasoning_effort": of("reasoning", given, "effort", str)}


def _logprobs(asked: ResponsesRequest) -> Json:
    for name in asked.include or ():
        if name != LOGPROBS:
            wanted = f"{LOGPROBS}: there are no hosted tools, and reasoning is not encrypted but comes as text"
            raise wrong("include", name, wanted, "leave it out")
    if asked.include:
        return {"logprobs": True, "top_logprobs": asked.top_logprobs}
    if asked.top_logprobs:
        raise wrong("top_logprobs", asked.top_logprobs, f'"{LOGPROBS}" in include beside it')
    return {}
