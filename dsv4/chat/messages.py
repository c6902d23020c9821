"""OpenAI-style messages checked and brought to the four shapes that the V4 grammar renders.

`tool` messages become results inside a user block, neighbouring user messages become one block, results take the order
of the calls they answer, and old reasoning is dropped: the rules of the official encoder, in its order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv4.chat.control import TASKS
from dsv4.errors import PromptError

ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
Tool = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """A tool call of the past. `arguments` is the JSON text as the client sent it."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Block:
    """A part of a user turn: text (`call_id` None) or the result of the call with that id."""

    text: str
    call_id: str | None = None


@dataclass(frozen=True)
class Message:
    """One message after checking; `role` is never "tool" once `merge` has run. `blocks` are the user role's content."""

    role: str
    text: str = ""
    blocks: tuple[Block, ...] = ()
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    tools: tuple[Tool, ...] = ()
    response_format: Mapping[str, Any] | None = None
    task: str | None = None
    open_ended: bool = False


def read_messages(messages: Any) -> list[Message]:
    """Check and convert; `PromptError` names the message by its number from 0 and the field that is wrong."""
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError("no messages", got=repr(messages)[:80], wanted="a list with at least one message")
    return [_read(f"message {n}", message) for n, message in enumerate(messages)]


def _read(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        got = message.get("role") if isinstance(message, Mapping) else type(message).__name__
        raise PromptError(f"{where}: role", got=repr(got), wanted=", ".join(ROLES))
    role = message["role"]
    text = _content(where, role, message)
    call_id = _string(where, "tool_call_id", message) if role == "tool" else None
    return Message(
        role,
        text,
        (Block(text, call_id),) if role in ("user", "tool") else (),
        _reasoning(where, message),
        tuple(_call(f"{where}: tool_calls[{n}]", call) for n, call in enumerate(_list(where, "tool_calls", message))),
        read_tools(where, _list(where, "tools", message)),
        _object(where, "response_format", message),
        _task(where, message),
        bool(message.get("wo_eos") or message.get("prefix")),
    )


def _content(where: str, role: str, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None and role in ("system", "assistant", "tool"):
        return ""
    if isinstance(content, str) and (content or role != "developer"):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        return "\n\n".join(_part(where, role, part) for part in content)
    raise PromptError(f"{where}: content of {role}", got=repr(content)[:80], wanted="a text or a list of text parts")


def _part(where: str, role: str, part: Mapping[str, Any]) -> str:
    kind, text = part.get("type"), part.get("text")
    if kind == "text" and isinstance(text, str):
        return text
    if role == "tool" and kind != "text":
        return f"[Unsupported {kind}]"  # a tool's answer is not the user's doing: the model is told, as it was trained
    raise PromptError(f"{where}: content part", got=f"type {kind!r}", wanted="text parts: these models read text only")


def _reasoning(where: str, message: Mapping[str, Any]) -> str:
    """Servers disagree on the name of this field; both are taken."""
    names = [name for name in ("reasoning_content", "reasoning") if message.get(name) is not None]
    texts = {_string(where, name, message) for name in names}
    if len(texts) > 1:
        raise PromptError(f"{where}: reasoning_content and reasoning differ", do="send one of them")
    return texts.pop() if texts else ""


def _task(where: str, message: Mapping[str, Any]) -> str | None:
    task = message.get("task")
    if task is not None and task not in list(TASKS):
        raise PromptError(f"{where}: task", got=repr(task), wanted=", ".join(TASKS))
    return None if task is None else str(task)


def _call(where: str, call: Any) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise PromptError(where, got=repr(call)[:80], wanted='{"id": …, "function": {"name": …, "arguments": "JSON"}}')
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise PromptError(f"{where}: arguments", got=type(arguments).__name__, wanted="a JSON text")
    return Call(function["name"], arguments, _string(where, "id", call))


def read_tools(where: str, tools: Any) -> tuple[Tool, ...]:
    """Function schemas of OpenAI-style tools; `PromptError` for anything else."""
    if not isinstance(tools, list | tuple):
        raise PromptError(f"{where}: tools", got=type(tools).__name__, wanted="a list")
    read = tuple(_tool(f"{where}: tools[{n}]", tool) for n, tool in enumerate(tools))
    (name, count), *_ = Counter(tool["name"] for tool in read).most_common(1) or [("", 0)]
    if count > 1:  # a call could mean either
        raise PromptError(
            f"{where}: tools", got=f"{count} of the name {name!r:.60}", wanted="a name of its own for each"
        )
    return read


def _tool(where: str, tool: Any) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise PromptError(
            where, got=repr(tool)[:80], wanted='{"type": "function", "function": {"name": …, "parameters": {…}}}'
        )
    return dict(function)


def _string(where: str, name: str, message: Mapping[str, Any]) -> str:
    value = message.get(name)
    if value is not None and not isinstance(value, str):
        raise PromptError(f"{where}: {name}", got=type(value).__name__, wanted="a text")
    return value or ""


def _list(where: str, name: str, message: Mapping[str, Any]) -> list[Any]:
    value = message.get(name)
    if value is not None and not isinstance(value, list):
        raise PromptError(f"{where}: {name}", got=type(value).__name__, wanted="a list")
    return value or []


def _object(where: str, name: str, message: Mapping[str, Any]) -> Mapping[str, Any] | None:
    value = message.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise PromptError(f"{where}: {name}", got=type(value).__name__, wanted="an object")
    return value or None


def merge(messages: Iterable[Message]) -> list[Message]:
    """Tool messages and neighbouring user messages as single user turns.

    Text after a turn with a quick task begins a new turn; a tool result joins even then.
    """
    out: list[Message] = []
    for message in messages:
        last = out[-1] if out and out[-1].role == "user" else None
        if message.role not in ("user", "tool"):
            out.append(message)
        elif last is None or (message.role == "user" and last.task is not None):
            out.append(Message("user", blocks=message.blocks, task=message.task))
        elif message.task is not None:
            raise PromptError(
                "a quick task cannot follow another user message or tool result",
                got=message.task,
                do="put all of it into one message",
            )
        else:
            out[-1] = replace(last, blocks=last.blocks + message.blocks)
    return out


def sort_results(messages: Iterable[Message]) -> list[Message]:
    """Tool results in the order of the latest calls, in the places where results stood; unknown ids come first."""
    order: dict[str, int] = {}
    out: list[Message] = []
    for message in messages:
        if message.calls:
            order = {call.id: n for n, call in enumerate(message.calls) if call.id}
        results = [block for block in message.blocks if block.call_id is not None]
        if len(results) > 1:
            ordered = iter(sorted(results, key=lambda block: order.get(block.call_id or "", 0)))
            message = replace(message, blocks=tuple(b if b.call_id is None else next(ordered) for b in message.blocks))
        out.append(message)
    return out


def last_user(messages: Sequence[Message]) -> int:
    """Index of the last user or developer message, -1 if there is none."""
    return max((n for n, message in enumerate(messages) if message.role in ("user", "developer")), default=-1)


def drop_old(messages: Sequence[Message]) -> list[Message]:
    """Without the developer messages before the last user turn. The renderer leaves old reasoning out."""
    end = last_user(messages)
    return [message for n, message in enumerate(messages) if n >= end or message.role != "developer"]
