"""Cases of OpenAI's /v1/responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from dsv4.check.conform import checks as c
from dsv4.check.conform import response_checks as r
from dsv4.check.conform.case import BAD, HELLO, NOWHERE, PARAMETERS, QUESTION, REFUSED, RESPONSES, SCHEMA, Case

SHORT: Final[Mapping[str, Any]] = {"input": HELLO[0]["content"], "max_output_tokens": 16, "temperature": 0}
LONG: Final[Mapping[str, Any]] = {**SHORT, "max_output_tokens": 200}
BRIEF: Final = "Be brief."
TOOL: Final = {"type": "function", "name": "warmth", "description": "of a city", "parameters": PARAMETERS,
               "strict": False}  # fmt: skip
MADE: Final = {"type": "function_call", "call_id": "call_1", "name": "warmth", "arguments": "{}"}
UNASKED: Final = {"type": "function_call_output", "call_id": "call_none", "output": "17 degrees"}
CALL: Final[Mapping[str, Any]] = {**LONG, "input": QUESTION, "tools": [TOOL]}
LOGPROBS: Final = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
FORM: Final = {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}


def _said(*parts: str) -> list[Any]:
    return [{"type": "input_text", "text": part} for part in parts]


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _next(got: c.Got, *items: Any) -> Any:
    """The conversation gone on with: the items as they came, and more."""
    return {**got.asked, "input": [_user(got.asked["input"]), *r.response(got)["output"], *items]}


def _output(output: Any) -> Callable[[c.Got], Any]:
    """What each function gave that was called."""

    def body(got: c.Got) -> Any:
        r.called(got)
        calls = r.items(got, "function_call")
        return _next(got, *({"type": "function_call_output", "call_id": call["call_id"], "output": output}
                            for call in calls))  # fmt: skip

    return body


def _turn(got: c.Got) -> Any:
    return _next(got, _user("And now?"))


def _from(got: c.Got) -> Any:
    return {**SHORT, "input": "And now?", "previous_response_id": r.response(got)["id"]}


def _response(name: str, body: Any, *checks: c.Check, after: str | None = "a response", **more: Any) -> Case:
    return Case(name, more.pop("group", "responses"), RESPONSES, body, checks, after=after, **more)


def _streamed(like: str, *checks: c.Check) -> Case:
    """The same as a stream: it says the same, and its events come as they should."""
    body = {**next(case.body for case in _WHOLE if case.name == like), "stream": True}
    return _response(f"{like}, streamed", body, c.named, r.formed, *checks, like=like)


def _option(name: str, body: Mapping[str, Any], *checks: c.Check, **more: Any) -> Case:
    """What a server may refuse."""
    return _response(name, body, r.formed, *checks, absent=REFUSED, **more)


def _wrong(name: str, body: Any, *statuses: int) -> Case:
    return _response(name, body, c.error(*(statuses or BAD)))


_WHOLE: Final = (
    _response("a response", LONG, r.formed, after=None, absent=NOWHERE),
    _response("cut at max_output_tokens", SHORT, r.formed, r.cut),
    _response("reasoning", LONG, r.formed, r.reasoned),
    _response("a function call", CALL, r.formed, r.called),
)
CASES: Final = (
    *_WHOLE,
    _streamed("a response"),
    _streamed("cut at max_output_tokens", r.cut),
    _streamed("reasoning", r.reasoned),
    _streamed("a function call", r.called),
    _response("input as items", {**LONG, "input": [_user(SHORT["input"])]}, r.formed, like="a response"),
    _response("input in parts", {**LONG, "input": [{"type": "message", **_user(_said(SHORT["input"]))}]}, r.formed,
              like="a response"),
    _response("instructions", {**LONG, "instructions": BRIEF}, r.formed, r.longer, r.repeats("instructions")),
    _response("a developer's message", {**LONG, "input": [{"role": "developer", "content": BRIEF},
              _user(SHORT["input"])]}, r.formed, r.longer),
    _response("metadata", {**SHORT, "metadata": {"of": "mine"}}, r.formed, r.repeats("metadata")),
    _response("items sent back", _turn, r.formed, r.longer),
    _response("a function's output", _output("17 degrees"), r.formed, r.longer, after="a function call"),
    _response("a function's output in parts", _output(_said("17 degrees")), r.formed, after="a function call",
              like="a function's output"),
    _response("a client that leaves a response", {**LONG, "stream": True}, r.formed, leave=True),
    _response("previous_response_id", _from, r.kept),
    _wrong("an unknown previous_response_id", {**SHORT, "previous_response_id": "resp_none"}, 400, 404),
    _option("without reasoning", {**LONG, "reasoning": {"effort": "none"}}, r.silent),
    _option("a function call required", {**CALL, "tool_choice": "required"}, r.called),
    _option("a function call by name", {**CALL, "tool_choice": {"type": "function", "name": "warmth"}}, r.called),
    _option("one function call at most", {**CALL, "parallel_tool_calls": False}, r.called),
    _option("no function call", {**CALL, "tool_choice": "none"}, r.uncalled),
    _option("logprobs of a response", {**LONG, **LOGPROBS}, r.logprobs),
    _option("json_object of a response", {**LONG, "input": "Paris as JSON.", "text": {"format": {"type":
            "json_object"}}}, r.json_text, group="structured"),
    _option("json_schema of a response", {**LONG, "input": "Paris as JSON.", "text": {"format": FORM}}, r.held,
            group="structured"),
    _wrong("a response to no JSON", b'{"input": '),
    _wrong("no input", {"max_output_tokens": 16}),
    _wrong("an empty list of input", {**SHORT, "input": []}),
    _wrong("an item of an unknown role", {**SHORT, "input": [{"role": "wizard", "content": "Hello."}]}),
    _wrong("an item of an unknown type", {**SHORT, "input": [{"type": "no-such-type"}]}),
    _wrong("an output of a call that was not made", {**SHORT, "input": [UNASKED]}),
    _wrong("a function call without its output", {**SHORT, "input": [*HELLO, MADE, *HELLO]}),
    _wrong("max_output_tokens of 0", {**SHORT, "max_output_tokens": 0}),
    _wrong("a response of an unknown model", {**SHORT, "model": "no-such-model"}, 404, 400),
)  # fmt: skip
