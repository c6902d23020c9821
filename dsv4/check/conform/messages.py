"""Cases of Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from dsv4.check.conform import checks as c
from dsv4.check.conform import message_checks as m
from dsv4.check.conform.case import HELLO, MESSAGES, NOWHERE, PARAMETERS, QUESTION, REFUSED, SCHEMA, Case

COUNT: Final = MESSAGES + "/count_tokens"
SHORT: Final[Mapping[str, Any]] = {"messages": HELLO, "max_tokens": 16, "temperature": 0}
ONE: Final[Mapping[str, Any]] = {**SHORT, "max_tokens": 1}
BRIEF: Final = "Be brief."
STOPS: Final[Mapping[str, Any]] = {**SHORT, "stop_sequences": ["e", "a", "o", "i", " "]}
# The least budget that Anthropic takes, and room for an answer behind it.
THINK: Final[Mapping[str, Any]] = {
    **SHORT, "max_tokens": 1200, "thinking": {"type": "enabled", "budget_tokens": 1024}
}  # fmt: skip
TOOL: Final = {"name": "warmth", "description": "of a city", "input_schema": PARAMETERS}
CALL: Final[Mapping[str, Any]] = {
    "messages": [{"role": "user", "content": QUESTION}], "tools": [TOOL], "max_tokens": 200, "temperature": 0
}  # fmt: skip
USE: Final = {"type": "tool_use", "id": "toolu_1", "name": "warmth", "input": {"city": "Paris"}}
UNASKED: Final = {"type": "tool_result", "tool_use_id": "toolu_none", "content": "17 degrees"}
FORM: Final = {"format": {"type": "json_schema", "schema": SCHEMA}}


def _blocks(*texts: str) -> list[Any]:
    return [{"type": "text", "text": text} for text in texts]


def _next(got: c.Got, *content: Any) -> Any:
    """The conversation gone on with: the answer as it came, and a turn of the user."""
    said = [{"role": "assistant", "content": m.message(got)["content"]}, {"role": "user", "content": list(content)}]
    return {**_asked(got), "messages": [*got.asked["messages"], *said]}


def _asked(got: c.Got) -> dict[str, Any]:
    return {name: value for name, value in got.asked.items() if name != "stream"}


def _result(content: Any) -> Callable[[c.Got], Any]:
    """What each tool gave that was used."""

    def body(got: c.Got) -> Any:
        m.used(got)
        uses = m.blocks(got, "tool_use")
        return _next(got, *({"type": "tool_result", "tool_use_id": use["id"], "content": content} for use in uses))

    return body


def _thoughts(got: c.Got) -> Any:
    m.thought(got)
    return _next(got, *_blocks("And now?"))


def _prompt(got: c.Got) -> Any:
    """What decides the prompt of the same request."""
    return {name: value for name, value in got.asked.items() if name not in ("max_tokens", "temperature")}


def _message(name: str, body: Any, *checks: c.Check, after: str | None = "a message", **more: Any) -> Case:
    return Case(name, more.pop("group", "messages"), more.pop("path", MESSAGES), body, checks, after=after, **more)


def _streamed(like: str, *checks: c.Check, **more: Any) -> Case:
    """The same as a stream: it says the same, and its events come as they should."""
    body = {**next(case.body for case in _WHOLE if case.name == like), "stream": True}
    return _message(f"{like}, streamed", body, c.named, m.formed, *checks, like=like, **more)


def _choice(name: str, choice: Mapping[str, Any], *checks: c.Check) -> Case:
    return _message(name, {**CALL, "tool_choice": choice}, m.formed, *checks, absent=REFUSED)


def _counts(name: str, after: str) -> Case:
    return _message(name, _prompt, m.counted, after=after, path=COUNT, absent=NOWHERE)


def _wrong(name: str, body: Any, kind: str = "invalid_request_error", *statuses: int, **more: Any) -> Case:
    return _message(name, body, m.refused(kind, *(statuses or (400,))), **more)


def _of(*messages: Any) -> Any:
    return {**SHORT, "messages": list(messages)}


_WHOLE: Final = (
    _message("a message", SHORT, m.formed, after=None, absent=NOWHERE),
    _message("a message cut at max_tokens", ONE, m.formed, m.ends("max_tokens")),
    _message("stop_sequences", STOPS, m.formed, m.stopped),
    _message("thinking", THINK, m.formed, m.thought, absent=REFUSED),
    _message("a tool used", CALL, m.formed, m.used),
)
CASES: Final = (
    *_WHOLE,
    _streamed("a message"),
    _streamed("a message cut at max_tokens"),
    _streamed("stop_sequences", m.stopped),
    _streamed("thinking", m.thought, absent=REFUSED),
    _streamed("a tool used", m.used),
    _message("text in blocks", _of({"role": "user", "content": _blocks("Say hello.")}), m.formed, like="a message"),
    _message("a system prompt", {**SHORT, "system": BRIEF}, m.formed, m.longer),
    _message("a system prompt in blocks", {**SHORT, "system": _blocks(BRIEF)}, m.longer, like="a system prompt"),
    _message("thinking sent back", _thoughts, m.formed, m.longer, after="thinking"),
    _message("a tool's result", _result("17 degrees"), m.formed, m.longer, after="a tool used"),
    _message("a tool's result in blocks", _result(_blocks("17 degrees")), m.formed, after="a tool used",
             like="a tool's result"),
    _message("an answer that is begun", _of(*HELLO, {"role": "assistant", "content": "Hel"}), m.formed, m.longer,
             absent=REFUSED),
    _message("a client that leaves a message", {**SHORT, "max_tokens": 64, "stream": True}, m.formed, leave=True),
    _choice("any tool", {"type": "any"}, m.used),
    _choice("a tool by name", {"type": "tool", "name": "warmth"}, m.used),
    _choice("one tool at most", {"type": "auto", "disable_parallel_tool_use": True}, m.used),
    _choice("no tool", {"type": "none"}, m.unused),
    _message("json_schema of a message", {**SHORT, "max_tokens": 200, "output_config": FORM}, m.formed, m.held,
             group="structured", absent=REFUSED),
    _counts("tokens of a message", "a message"),
    _counts("tokens with a system prompt", "a system prompt"),
    _counts("tokens with thinking", "thinking"),
    _counts("tokens with tools", "a tool used"),
    _message("another anthropic-version", SHORT, m.formed, headers={"anthropic-version": "2023-01-01",
             "anthropic-beta": "no-such-thing-2020-01-01"}, like="a message"),
    _message("x-api-key", SHORT, m.formed, headers={"Authorization": "", "x-api-key": "{key}"}),
    _wrong("a wrong x-api-key", SHORT, "authentication_error", 401,
           headers={"Authorization": "", "x-api-key": "wrong"}),
    _wrong("messages that are no JSON", b'{"messages": ['),
    _wrong("no list of messages", {"max_tokens": 4}),
    _wrong("an empty list of messages", _of()),
    _wrong("a message of no content", _of({"role": "user", "content": []})),
    _wrong("a message of an unknown role", _of({"role": "wizard", "content": "Hello."})),
    _wrong("a block of an unknown type", _of({"role": "user", "content": [{"type": "no-such-type"}]})),
    _wrong("a result of a tool that was not used", _of(*HELLO, {"role": "user", "content": [UNASKED]})),
    _wrong("a tool used without a result", _of(*HELLO, {"role": "assistant", "content": [USE]}, *HELLO)),
    _wrong("two tools of one name", {**CALL, "tools": [TOOL, TOOL]}),
    _wrong("no max_tokens", {"messages": HELLO}),
    _wrong("max_tokens of 0", {**SHORT, "max_tokens": 0}),
    _wrong("a temperature that is a text", {**SHORT, "temperature": "hot"}),
    _wrong("a message to an unknown model", {**SHORT, "model": "no-such-model"}, "not_found_error", 404),
    _wrong("tokens of no messages", {}, path=COUNT, after="tokens of a message"),
)  # fmt: skip
