"""Tool calls as a grammar: the DSML block of `chat.tools`, each function's JSON schema turned into its parameters.

DSML writes arguments one by one, texts bare and all else as JSON. So a schema is taken apart: each property becomes a
parameter, in the schema's order, which a call may leave out if the schema says so. A text that has only an enumeration
or a length to keep stands bare; one that has more to keep (a pattern, a format) is written as a JSON string.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4.chat.grammar_json import ANNOTATIONS, DEFINITIONS, UNMARKED, apart, definition, guided, literal
from dsv4.chat.messages import Tool
from dsv4.errors import RequestError

_KNOWN = {"type", "properties", "required", "additionalProperties", *DEFINITIONS} | ANNOTATIONS
_LONGEST_NAME = 256


@dataclass(frozen=True)
class Calls:
    """The calls that an answer may make. `forced`: it is calls and nothing else. `one`: a single call."""

    tools: Sequence[Tool]
    forced: bool = False
    one: bool = False


def call_rules(calls: Calls, mark: int) -> str:
    """Lark rules for `block`, which begins at the token `mark` behind a "<".

    Of a tool that is `strict`, a schema that cannot be kept whole raises RequestError with tool and keyword; of others
    what cannot be kept is ignored.
    """
    names = " | ".join(f"call_{n}" for n in range(len(calls.tools)))
    rules = [
        f'block: mark "tool_calls>\\n" ({names}){"" if calls.one else "+"} "</" mark "tool_calls>"',
        f"mark: <[{mark}]>",
        *(rule for n, tool in enumerate(calls.tools) for rule in _call(n, tool)),
    ]
    return "\n".join(rules)


def _call(n: int, tool: Tool) -> Iterator[str]:
    try:
        yield from _rules(n, tool, bool(tool.get("strict")))
    except RequestError as error:
        what = f"tool {tool['name'][:60]!r}: {error.what}"
        raise RequestError(what, got=error.got, wanted=error.wanted, do=error.do) from None


def _rules(n: int, tool: Tool, strict: bool) -> Iterator[str]:
    schema = _object(tool.get("parameters", {}), strict)
    properties, required = schema["properties"], schema["required"]
    parts = [f"value_{n}_{k}" + "?" * (name not in required) for k, name in enumerate(properties)]
    more = schema.get("additionalProperties", False)
    if more is not False:
        others = "".join(f" & ~{literal(name)}" for name in properties)
        yield rf'NAME_{n}: /[^"\n]{{1,{_LONGEST_NAME}}}/ & {UNMARKED}{others}'
        yield from _parameter(f"more_{n}", f'"parameter name=\\"" NAME_{n} "\\""', apart(more, schema), strict)
        parts.append(f"more_{n}*")
    if not required:
        parts.append('"\\n"?')  # a call without parameters has an empty line
    yield f'call_{n}: "<" mark {_named("invoke", tool["name"])} ">\\n" {" ".join(parts)} "</" mark "invoke>\\n"'
    for k, (name, value) in enumerate(properties.items()):
        yield from _parameter(f"value_{n}_{k}", _named("parameter", name), apart(value, schema), strict)


def _parameter(rule: str, opening: str, value: tuple[list[str], Any], strict: bool) -> Iterator[str]:
    texts, others = value
    ways = []
    if texts:
        text = rule.upper()
        yield f'{text}: ({" | ".join(texts)}) "</"'
        ways.append(f'"true\\">" {text}')
    if others is not None:
        ways.append(f'"false\\">" %json {json.dumps(guided(others, strict))} "</"')
    if not ways:
        raise RequestError("no value satisfies the schema of a parameter", got=opening[:60])
    yield f'{rule}: "<" mark {opening} " string=\\"" ({" | ".join(ways)}) mark "parameter>\\n"'


def _named(kind: str, name: str) -> str:
    if not 0 < len(name) <= _LONGEST_NAME or not {'"', "\n"}.isdisjoint(name):
        wanted = f"1 to {_LONGEST_NAME} characters without quotation marks and line breaks"
        raise RequestError("a call cannot hold this name", got=repr(name)[:60], wanted=wanted)
    return literal(f'{kind} name="{name}"')


def _object(parameters: Any, strict: bool) -> dict[str, Any]:
    """A schema of parameters, checked and resolved: an object with `properties` and `required`."""
    if not isinstance(parameters, Mapping):
        raise RequestError("parameters", got=repr(parameters)[:60], wanted="a JSON schema of an object")
    schema = dict(parameters)
    if "$ref" in schema:
        schema = {**schema, **(definition(schema, schema) or {"type": "nothing that there is"})}
        del schema["$ref"]
    kind, properties, required = schema.get("type", "object"), schema.get("properties", {}), schema.get("required", [])
    if kind != "object" or not isinstance(properties, Mapping) or not isinstance(required, list):
        raise RequestError("parameters", got=repr(parameters)[:60], wanted="a JSON schema of an object")
    strange = [name for name in schema if name not in _KNOWN]
    if strict and (strange or schema.get("additionalProperties")):
        do = "leave it out, or leave out strict"
        raise RequestError("a call cannot be held to this keyword", got=(strange or ["additionalProperties"])[0], do=do)
    undeclared = dict.fromkeys((name for name in required if name not in properties), True)
    if undeclared and schema.get("additionalProperties") is False:
        raise RequestError("required names no property", got=repr(next(iter(undeclared)))[:60])
    return {**schema, "properties": {**properties, **undeclared}, "required": required}
