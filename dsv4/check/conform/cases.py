"""The cases: an endpoint, what is sent, what must be true of the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dsv4.check.conform import checks as c
from dsv4.check.conform import messages, responses
from dsv4.check.conform.case import BAD, CHAT, HELLO, NOWHERE, PARAMETERS, QUESTION, REFUSED, SCHEMA, TEXT, Case

SHORT: Final[Mapping[str, Any]] = {"messages": HELLO, "max_tokens": 8, "temperature": 0, "seed": 1}
STREAM: Final[Mapping[str, Any]] = {**SHORT, "stream": True, "stream_options": {"include_usage": True}}
TOOL: Final = {"type": "function", "function": {"name": "warmth", "description": "of a city", "parameters": PARAMETERS}}
CALL: Final[Mapping[str, Any]] = {
    "messages": [{"role": "user", "content": QUESTION}],
    "tools": [TOOL],
    "max_tokens": 200,
    "temperature": 0,
}
NAMED: Final = {"type": "function", "function": {"name": "warmth"}}
ASKED: Final = {"id": "call_1", "type": "function", "function": {"name": "warmth", "arguments": '{"city": "Paris"}'}}
ROUND: Final = [
    *CALL["messages"],
    {"role": "assistant", "content": None, "tool_calls": [ASKED]},
    {"role": "tool", "tool_call_id": "call_1", "content": "17 degrees"},
]
HELD: Final = {"messages": [{"role": "user", "content": "Paris as JSON."}], "max_tokens": 200, "temperature": 0}


def _get(name: str, group: str, path: str, *checks: c.Check, absent: tuple[int, ...] = ()) -> Case:
    return Case(name, group, path, None, checks, "GET", absent)


def _chat(name: str, body: Mapping[str, Any], *checks: c.Check, group: str = "chat", **more: Any) -> Case:
    return Case(name, group, more.pop("path", CHAT), body, checks, **more)


_STREAMED = (c.ok, c.framed, c.one_end)
CASES: Final = (
    _get("models are listed", "models", "/models", c.ok, c.has("object", "list"), c.has("data.0.object", "model")),
    _get("a model by its name", "models", "/models/{model}", c.ok, c.has("id", str), c.has("object", "model"),
          absent=NOWHERE),
    _chat("a whole answer", SHORT, c.ok, c.has("object", "chat.completion"), c.has("id", str), c.has("created", int),
          c.has("model", str), c.finishes("stop", "length")),
    _chat("the role", SHORT, c.ok, c.has("choices.0.message.role", "assistant")),
    _chat("usage", SHORT, c.ok, c.usage),
    _chat("the same again", SHORT, c.ok, like="a whole answer"),
    _chat("a stream says the same", STREAM, *_STREAMED, like="a whole answer"),
    _chat("a seed decides", {**SHORT, "temperature": 1}, c.ok, like="a seed decides"),
    _chat("cut at max_tokens", {**SHORT, "max_tokens": 1}, c.ok, c.finishes("length"), c.usage),
    _chat("max_completion_tokens", {"messages": HELLO, "max_completion_tokens": 1}, c.ok, c.finishes("length")),
    _chat("two answers", {**SHORT, "n": 2}, c.ok, c.has("choices.1.index", 1), c.usage),
    _chat("two answers, streamed", {**STREAM, "n": 2}, *_STREAMED, c.usage_last),
    _chat("stop strings", {**SHORT, "stop": ["e", "a", "o", "i", " "]}, c.ok, c.finishes("stop", "length")),
    _chat("logprobs", {**SHORT, "logprobs": True, "top_logprobs": 2}, c.ok, c.logprobs),
    _chat("logit_bias", {**SHORT, "logit_bias": {"5": -100}}, c.ok, c.finishes("stop", "length")),
    _chat("roles", {**SHORT, "messages": [{"role": "system", "content": "Be brief."}, *HELLO,
          {"role": "assistant", "content": "Hello."}, *HELLO]}, c.ok, c.has("choices.0.message.role", "assistant")),
    _chat("content in parts", {**SHORT, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
          c.ok),
    _chat("no effort", {**SHORT, "reasoning_effort": "none"}, c.ok, group="reasoning", absent=REFUSED),
    _chat("thinking off", {**SHORT, "thinking": {"type": "disabled"}}, c.ok, group="reasoning", absent=REFUSED),
    _chat("framing", STREAM, c.ok, c.framed, group="stream"),
    _chat("the role comes first", STREAM, c.ok, c.role_first, group="stream"),
    _chat("one end and nothing behind it", STREAM, c.ok, c.one_end, group="stream"),
    _chat("one id in all chunks", STREAM, c.ok, c.same_head, group="stream"),
    _chat("usage in the last chunk", STREAM, c.ok, c.usage_last, group="stream"),
    _chat("UTF-8 is never cut", {**STREAM, "max_tokens": 48, "temperature": 1,
          "messages": [{"role": "user", "content": "Zeig mir 你好 und 👋🏽!"}]}, *_STREAMED, group="stream"),
    _chat("a client that leaves", {**STREAM, "max_tokens": 64}, c.ok, group="stream", leave=True),
    _chat("tools are taken", {**CALL, "max_tokens": 8}, c.ok, c.finishes("stop", "length", "tool_calls"),
          group="tools"),
    _chat("a round trip", {**SHORT, "tools": [TOOL], "messages": ROUND}, c.ok, group="tools"),
    _chat("tool_choice none", {**CALL, "max_tokens": 8, "tool_choice": "none"}, c.ok, c.finishes("stop", "length"),
          group="tools"),
    _chat("a call", CALL, c.ok, c.called, group="tools"),
    _chat("a call, streamed", {**CALL, "stream": True}, *_STREAMED, c.call_deltas, group="tools"),
    _chat("one call at most", {**CALL, "parallel_tool_calls": False}, c.ok, c.called, group="tools"),
    _chat("a call required", {**CALL, "tool_choice": "required"}, c.ok, c.called, group="tools", absent=REFUSED),
    _chat("a call by name", {**CALL, "tool_choice": NAMED}, c.ok, c.called, group="tools", absent=REFUSED),
    _chat("json_object", {**HELD, "response_format": {"type": "json_object"}}, c.ok, c.json_content,
          group="structured", absent=REFUSED),
    _chat("json_schema", {**HELD, "response_format": {"type": "json_schema", "json_schema": {"name": "city",
          "strict": True,
          "schema": SCHEMA}}}, c.ok, c.json_kind, group="structured", absent=REFUSED),
    _chat("a completion", {"prompt": "Hello", "max_tokens": 4, "temperature": 0}, c.ok, c.has("object",
          "text_completion"),
          c.has("choices.0.text", str), c.finishes("stop", "length"), c.usage,
          group="completions", path=TEXT, absent=NOWHERE),
    _chat("a completion, streamed", {"prompt": "Hello", "max_tokens": 4, "temperature": 0, "stream": True}, *_STREAMED,
          group="completions", path=TEXT, absent=NOWHERE, like="a completion"),
    *responses.CASES,
    *messages.CASES,
    _chat("a body that is no JSON", b'{"messages": [', c.error(*BAD), group="errors"),  # type: ignore[arg-type]
    _chat("no messages", {"max_tokens": 4}, c.error(*BAD), group="errors"),
    _chat("an answer to a call that was not made", {**SHORT, "messages": [*ROUND[:1], *ROUND[2:]]}, c.error(*BAD),
          group="errors"),
    _chat("a call without an answer", {**SHORT, "messages": [*ROUND[:2], *HELLO]}, c.error(*BAD), group="errors"),
    _chat("a wrong type", {**SHORT, "temperature": "hot"}, c.error(*BAD), group="errors"),
    _chat("an unknown model", {**SHORT, "model": "no-such-model"}, c.error(404, 400), group="errors"),
    _chat("more than the context", {**SHORT, "max_tokens": 1 << 30}, c.error(*BAD), group="errors"),
    Case("a wrong method", "errors", CHAT, None, (c.error(405, 404),), "GET"),
    _get("a wrong path", "errors", "/no-such-path", c.error(404)),
    Case("a wrong key", "errors", CHAT, SHORT, (c.error(401, 403),), headers={"Authorization": "Bearer wrong"}),
    Case("tokenize", "tokenizer", "=/tokenize", {"prompt": "Hello"}, (c.ok, c.has("tokens", list)), absent=NOWHERE),
    _get("health", "watching", "=/health", c.ok, absent=NOWHERE),
    _get("metrics", "watching", "=/metrics", c.ok, absent=NOWHERE),
)  # fmt: skip
