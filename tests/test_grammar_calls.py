"""Calls held to a grammar: tokens by chance become DSML that the parser reads, and arguments satisfy their schema."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.chat.control import as_text
from dsv4.chat.events import Completion
from dsv4.chat.grammar_calls import Calls
from dsv4.chat.grammar_json import Json
from dsv4.chat.grammar_text import choice_answer, grammar_text
from dsv4.chat.messages import Call
from dsv4.chat.parse import parse_completion
from dsv4.chat.tools import render_calls
from dsv4.errors import RequestError
from tests.babble import BYTES, GRAMMARS, MARK, WORDS, next_tokens, walk
from tests.test_grammar import FORMATS, SCHEMAS, SHORT

EMPTY: Json = {"type": "object", "properties": {}}
CITY: Json = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 2, "maxLength": 9},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "day": {"type": "string", "format": "date"},
        "unit": {"enum": ["°C", "°F", None]},
        "note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}], "default": None},
        "kind": {"$ref": "#/$defs/kind"},
    },
    "required": ["city", "unit", "kind"],
    "additionalProperties": False,
    "$defs": {"kind": {"type": "string", "enum": ["</a", "b\n", '"c"']}},
}


def tool(parameters: Any = None, name: str = "f", **more: Any) -> Json:
    return {"name": name, "strict": True, "parameters": EMPTY if parameters is None else parameters} | more


def calling(*tools: Json, forced: bool = True, one: bool = False, answer: Json | None = None) -> Any:
    return GRAMMARS.compile(grammar_text(answer, Calls(tools, forced, one), MARK))


def called(grammar: Any, seed: int, only: Any = ()) -> Completion:
    text, whole = walk(grammar, seed, only=only)
    assert whole, text
    found = parse_completion(text.decode(), in_reasoning=False)
    assert not found.problems, text
    assert not found.raw
    assert all(call.complete for call in found.calls)
    return found


def check(parameters: Json, seed: int, only: Any = ()) -> None:
    found = called(calling(tool(parameters)), seed, only)
    assert found.content == ""
    assert found.calls
    for call in found.calls:
        jsonschema.validate(json.loads(call.arguments), parameters, format_checker=FORMATS)


NAMES = SHORT.filter(lambda text: text and not set(text) & set('"\n'))


@given(st.dictionaries(NAMES, SCHEMAS, max_size=3), st.integers(0, 3), st.integers(0, 1 << 30), st.booleans())
def test_calls_by_chance_satisfy_their_schema(properties: Json, needed: int, seed: int, bytewise: bool) -> None:
    required = list(properties)[:needed]
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    check(parameters, seed, BYTES if bytewise else ())


def test_texts_stand_bare_and_all_else_as_json() -> None:
    seen: dict[str, set[str]] = {}
    for seed in range(40):
        text = walk(calling(tool(CITY)), seed)[0].decode()
        for part in text.split('｜DSML｜parameter name="')[1:]:
            name, _, rest = part.partition('" string="')
            seen.setdefault(name, set()).add(rest.partition('"')[0])
        check(CITY, seed)
    both = {"true", "false"}
    assert seen == {"city": {"true"}, "days": {"false"}, "day": {"false"}, "unit": both, "note": both, "kind": {"true"}}


def test_the_only_way_to_write_a_call_is_the_one_that_was_taught() -> None:
    parameters = {"properties": {"a": {"const": "x y"}, "b": {"const": 5}}, "required": ["a", "b"]}
    text, _ = walk(calling(tool(parameters), one=True), 1)
    assert text.decode() == as_text(render_calls([Call("f", '{"a": "x y", "b": 5}')]))
    taught = as_text(render_calls([Call("f", "{}")]))
    assert taught in {walk(calling(tool(), one=True), seed)[0].decode() for seed in range(20)}


def test_one_call_or_several_of_one_tool_or_another() -> None:
    pair = (tool(name="f"), tool(name="g"))
    several = [called(calling(*pair), seed).calls for seed in range(40)]
    assert {call.name for calls in several for call in calls} == {"f", "g"}
    assert max(map(len, several)) > 1
    assert {len(called(calling(*pair, one=True), seed).calls) for seed in range(40)} == {1}


def test_text_is_free_until_a_call_begins() -> None:
    """And then the call keeps to the schema; a text without any call ends where it likes."""
    ids = [*WORDS.encode_text("It is < 5, </x> and\n\n<"), MARK]
    matcher = calling(tool(CITY), forced=False).start()
    for n, token in enumerate(ids):
        allowed = next_tokens(matcher.mask() or b"")
        assert token in allowed
        assert (MARK in allowed) == WORDS.decode(ids[:n]).endswith("<")
        assert WORDS.eos_id in allowed
        matcher.accept(token)
    assert {WORDS.token_bytes(token)[:1] for token in next_tokens(matcher.mask() or b"")} == {b"t"}


def test_no_letters_of_a_text_spell_the_mark() -> None:
    """Neither before a call nor in a bare text: the parser could not tell them from the token."""
    inside = [*WORDS.encode_raw('\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
                                '<｜DSML｜parameter name="a" string="true">')]  # fmt: skip
    free = tool({"properties": {"a": {"type": "string"}}, "required": ["a"]})
    for before, forced in (([], False), (inside, True)):
        matcher = calling(free, forced=forced).start()
        for token in before:
            assert token in next_tokens(matcher.mask() or b"")
            matcher.accept(token)
        spelled = WORDS.encode_text("</｜DSML｜")
        taken = []
        for token in spelled:
            if token not in next_tokens(matcher.mask() or b""):
                break
            matcher.accept(token)
            taken.append(token)
        assert 0 < len(taken) < len(spelled)


def test_an_answer_or_calls() -> None:
    grammar = calling(tool(CITY), forced=False, answer=choice_answer(["yes", "no"]))
    found = [called(grammar, seed) for seed in range(30)]
    assert {answer.content for answer in found} == {"yes", "no", ""}
    assert all(bool(answer.calls) == (answer.content == "") for answer in found)


def test_what_is_not_strict_keeps_what_can_be_kept() -> None:
    loose: Json = {
        "type": "object",
        "properties": {"a": {"type": "integer", "not": {"const": 5}}},
        "required": ["a", "b"],
        "minProperties": 2,
        "additionalProperties": {"type": "boolean"},
    }
    names: set[str] = set()
    for seed in range(20):
        text, whole = walk(calling(tool(loose, strict=False), one=True), seed, 400)
        if whole:
            (call,) = parse_completion(text.decode(), in_reasoning=False).calls
            arguments = json.loads(call.arguments)
            assert type(arguments.pop("a")) is int
            arguments.pop("b")
            assert all(type(value) is bool for value in arguments.values())
            names |= arguments.keys()
    assert names


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"properties": {"a": {"not": {}}}}, "not"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=a)"}}}, "look-ahead"),
        (
            {"anyOf": [{"required": ["a"]}]},
            "cannot be held to this keyword; got anyOf; leave it out, or leave out strict",
        ),
        ({"minProperties": 1}, "minProperties"),
        ({"patternProperties": {}}, "patternProperties"),
        ({"additionalProperties": True}, "additionalProperties"),
        ({"additionalProperties": {"type": "string"}}, "additionalProperties"),
        ({"type": "array"}, "wanted a JSON schema of an object"),
        ({"properties": []}, "wanted a JSON schema of an object"),
        ({"required": "a"}, "wanted a JSON schema of an object"),
        ([], "wanted a JSON schema of an object"),
        ({"$ref": "#/$defs/x"}, "wanted a JSON schema of an object"),
        ({"required": ["a"], "additionalProperties": False}, "required names no property; got 'a'"),
        ({"properties": {"a": 5}}, "a JSON schema; got 5"),
        ({"properties": {"a": False}}, "no value satisfies"),
        ({"properties": {"a": {"enum": []}}}, "no value satisfies"),
        ({"properties": {"a": {"enum": "b"}}}, "enum; got 'b'; wanted a list"),
        ({"properties": {"a": {"type": "string", "maxLength": "5"}}}, "maxLength; got '5'"),
        ({"properties": {"a": {"type": "objekt"}}}, "objekt"),
        ({"properties": {"a": {"items": {"$ref": "#"}}}}, "got '#'; wanted #/\\$defs/NAME"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"$ref": "#/$defs/b"}}}, "no value satisfies"),
        ({"properties": {'a"b': {}}}, "cannot hold this name"),
        ({"properties": {"": {}}}, "cannot hold this name"),
        ({"properties": {"a" * 300: {}}}, "cannot hold this name"),
        ({"properties": {"｜DSML｜": {}}}, "cannot hold ｜DSML｜"),
        ({"properties": {"a": {"const": "</｜DSML｜parameter>"}}}, "cannot hold ｜DSML｜"),
    ],
)
def test_what_a_call_cannot_be_held_to(parameters: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        calling(tool(parameters))


def test_a_refusal_names_the_tool() -> None:
    with pytest.raises(
        RequestError, match=r"^tool 'weather': a call cannot be held to this keyword; got minProperties"
    ):
        calling(tool(name="first"), tool({"minProperties": 1}, "weather"))


def test_definitions_that_fan_out_are_walked_once() -> None:
    fan = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)} | {"d60": {"type": "null"}}
    began = time.monotonic()
    check({"properties": {"a": {"$ref": "#/$defs/d0"}}, "required": ["a"], "$defs": fan}, 1)
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_as_many_tools_as_an_agent_brings() -> None:
    properties = {
        f"p{n}": [{"type": "string"}, {"type": "integer"}, {"type": "array", "items": {}}][n % 3] for n in range(8)
    }
    tools = [tool({"properties": properties, "required": ["p0"]}, f"tool_{n}") for n in range(60)]
    for seed in range(3):
        assert called(calling(*tools, one=True), seed).calls[0].name.startswith("tool_")
