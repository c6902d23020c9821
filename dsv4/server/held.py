"""What an answer is held to: response_format, structured_outputs, forced and strict calls, as one grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dsv4.chat.control import END_THINK, THINK, Control
from dsv4.chat.encode import Prompt
from dsv4.chat.grammar_calls import Calls
from dsv4.chat.grammar_json import Json
from dsv4.chat.grammar_text import choice_answer, json_answer, lark_answer, regex_answer
from dsv4.chat.messages import read_tools
from dsv4.engine.request import Grammar
from dsv4.errors import RequestError
from dsv4.llm import LLM
from dsv4.server.refusal import Refusal
from dsv4.server.schema import ChatRequest, Generating, TokenizeRequest

OBJECT: Json = {"type": "object"}
# structured_outputs: what the value of a field is, and the answer that it asks for.
STRUCTURES: Mapping[str, tuple[type, Callable[[Any], Json]]] = {
    "json": (dict, lambda schema: json_answer(schema, strict=True)),
    "json_object": (bool, lambda _: json_answer(OBJECT, strict=True)),
    "regex": (str, regex_answer),
    "choice": (list, choice_answer),
    "grammar": (str, lark_answer),
}


def chat_grammar(asked: ChatRequest, llm: LLM, prompt: Prompt) -> Grammar | None:
    """What the answer of a chat is held to, behind its reasoning; None for nothing. Refusal for what cannot be had."""
    calls, answer = _calls(asked), _answer(asked)
    if not (calls.forced or answer or any(tool.get("strict") for tool in calls.tools)):
        return None
    if prompt.pieces[-1] not in (Control(THINK), Control(END_THINK)):
        what = "an answer can be held to a grammar only from its beginning"
        raise Refusal(what, param="continue_final_message", do="leave it out")
    return _compiled(asked, llm, answer, calls if calls.tools else None, prompt.in_reasoning)


def text_grammar(asked: Generating, llm: LLM) -> Grammar | None:
    """What the continuation of a text is held to."""
    answer = _answer(asked)
    return None if answer is None else _compiled(asked, llm, answer, None, False)


def shown_schema(asked: ChatRequest | TokenizeRequest, llm: LLM) -> Mapping[str, Any] | None:
    """The schema that the prompt states: none if the model was not taught how a prompt does that."""
    form = _format(asked.response_format)
    return form["schema"] if "schema" in form and llm.dialect.response_format is not None else None


def _compiled(asked: Generating, llm: LLM, answer: Json | None, calls: Calls | None, in_reasoning: bool) -> Grammar:
    try:
        return llm.grammar(answer, calls, in_reasoning=in_reasoning)
    except RequestError as error:
        param = "tools" if calls else "response_format" if asked.response_format else "structured_outputs"
        raise Refusal(f"{param}: {error.what}", param=param, got=error.got, wanted=error.wanted, do=error.do) from None


def _calls(asked: ChatRequest) -> Calls:
    """The calls that may be made: of all tools that the request or its messages offer, or of the one that it names."""
    offered = [asked.tools or (), *(message.get("tools") or () for message in asked.messages)]
    tools = [tool for some in offered for tool in read_tools("request", some)]
    one = asked.parallel_tool_calls is False
    match asked.tool_choice:
        case None | "auto":
            return Calls(tools, one=one)
        case "none":
            return Calls([])
        case "required" if tools:
            return Calls(tools, forced=True, one=one)
        case {"type": "function", "function": {"name": name}} if name in [tool["name"] for tool in tools]:
            return Calls([tool for tool in tools if tool["name"] == name], forced=True, one=True)
    wanted = 'auto or none, or with tools required or {"type": "function", "function": {"name": one of them}}'
    raise Refusal("tool_choice", param="tool_choice", got=repr(asked.tool_choice)[:90], wanted=wanted)


def _answer(asked: Generating) -> Json | None:
    form, structures = _format(asked.response_format), _structures(asked.structured_outputs)
    if form and structures:
        do = "send one of them"
        raise Refusal("response_format and structured_outputs", param="structured_outputs", do=do)
    if form:
        return json_answer(form.get("schema", OBJECT), bool(form.get("strict", True)))
    for name, value in structures.items():
        return STRUCTURES[name][1](value)
    return None


def _format(given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The schema of a response_format and whether it is strict; {} for text, {"type": "json_object"} for any object."""
    match given:
        case None | {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return given
        case {"type": "json_schema", "json_schema": {"name": str(), "schema": {} as schema, **rest}} if set(rest) <= {
            "strict",
            "description",
        } and rest.get("strict") in (None, False, True):
            return {"schema": schema, "strict": bool(rest.get("strict"))}
    wanted = 'text, json_object or {"type": "json_schema", "json_schema": {"name": …, "schema": {…}, "strict": …}}'
    raise Refusal("response_format", param="response_format", got=repr(given)[:90], wanted=wanted)


def _structures(given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The one field of structured_outputs that asks for something."""
    found = {name: value for name, value in (given or {}).items() if value not in (None, False)}
    right = [name in STRUCTURES and isinstance(value, STRUCTURES[name][0]) for name, value in found.items()]
    texts = found.get("choice", [""])
    if right not in ([], [True]) or not texts or not all(isinstance(text, str) for text in texts):
        wanted = f"one of {', '.join(STRUCTURES)}; choice is a list of texts"
        raise Refusal("structured_outputs", param="structured_outputs", got=repr(given)[:90], wanted=wanted)
    return found
