"""JSON schemas for grammars: whole for a JSON text, and taken apart for a place where texts stand bare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv4.chat.control import DSML
from dsv4.errors import RequestError

Json = dict[str, Any]
# No run of white space is endless: a model that has nothing to say would otherwise say just that.
WHITE_SPACE = r"[ \n\t]{1,64}"
# No bare text may spell the mark: whoever reads the text could not tell it from the token.
UNMARKED = f"~/(?s:.*){DSML}(?s:.*)/"
ANY_TEXT = f"(/(?s:.*)/ & {UNMARKED})"
DEFINITIONS = ("$defs", "definitions")
# Keywords that hold an answer to nothing.
ANNOTATIONS = frozenset(
    ("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly")
)
_BARE = {"type", "enum", "const", "minLength", "maxLength"}  # what a bare text can be held to


def guided(schema: Mapping[str, Any], strict: bool) -> Json:
    """The schema for the library. A keyword that it cannot enforce is an error if `strict`, else it is ignored."""
    how = {"lenient": not strict, "coerce_one_of": not strict, "whitespace_pattern": WHITE_SPACE}
    return {**schema, "x-guidance": how}


def apart(schema: Any, root: Mapping[str, Any]) -> tuple[list[str], Json | None]:
    """What a value may be: bare texts, as terminals of Lark, and a schema of all that is written as JSON, if any.

    `root` has the definitions that a `$ref` names. A text is bare if it has only an enumeration or a length to keep.
    """
    texts: list[str] = []
    others: list[Json] = []
    pending, seen = [schema], set()
    while pending:
        asked = _asserted(pending.pop(0))
        found = definition(asked, root) if set(asked) == {"$ref"} else None
        if found is not None:
            pending[:0] = [found] if asked["$ref"] not in seen else []  # a second time it adds nothing
            seen.add(asked["$ref"])
        elif set(asked) == {"anyOf"} and isinstance(asked["anyOf"], list):
            pending[:0] = asked["anyOf"]
        elif set(asked) <= _BARE and not {"enum", "const"} <= set(asked):
            texts += _texts(asked)
            others += _others(asked)
        else:
            others.append(asked)
    return texts, _together(others, root)


def _asserted(schema: Any) -> Json:
    """The keywords of a schema that decide anything."""
    if isinstance(schema, bool):
        return {} if schema else {"enum": []}
    if not isinstance(schema, Mapping):
        raise RequestError("a JSON schema", got=repr(schema)[:60], wanted="an object or a boolean")
    return {name: value for name, value in schema.items() if name not in ANNOTATIONS}


def definition(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """What the `$ref` of a schema names among the definitions of `root`; None if that is nothing."""
    match str(schema["$ref"]).split("/"):
        case ["#", place, name] if place in DEFINITIONS and isinstance(root.get(place), Mapping):
            return root[place].get(name.replace("~1", "/").replace("~0", "~"))
    return None


def _kinds(asked: Mapping[str, Any]) -> list[Any] | None:
    """The types that are allowed, None for any."""
    kinds = asked.get("type")
    return kinds if isinstance(kinds, list) or kinds is None else [kinds]


def _given(asked: Mapping[str, Any]) -> list[Any] | None:
    """The values that are allowed, None for any."""
    given = [asked["const"]] if "const" in asked else asked.get("enum")
    if given is not None and not isinstance(given, list):
        raise RequestError("enum", got=repr(given)[:60], wanted="a list")
    return given


def _texts(asked: Mapping[str, Any]) -> Iterator[str]:
    kinds, given = _kinds(asked), _given(asked)
    least, most = (_length(asked, name) for name in ("minLength", "maxLength"))
    if kinds is not None and "string" not in kinds:
        return
    if given is None:
        bounds = f"{{{least or 0},{'' if most is None else most}}}"
        yield ANY_TEXT if bounds == "{0,}" else f"(/(?s:.){bounds}/ & {UNMARKED})"
    for text in given or ():
        if isinstance(text, str) and (least or 0) <= len(text) and (most is None or len(text) <= most):
            yield literal(text)


def _length(asked: Mapping[str, Any], name: str) -> int | None:
    length = asked.get(name)
    if length is not None and (type(length) is not int or length < 0):
        raise RequestError(name, got=repr(length)[:60], wanted="a whole number")
    return length


def _others(asked: Mapping[str, Any]) -> Iterator[Json]:
    kinds, given = _kinds(asked), _given(asked)
    if given is not None:
        rest = [value for value in given if not isinstance(value, str)]
        if rest:
            yield {**{name: value for name, value in asked.items() if name != "const"}, "enum": rest}
    elif kinds is None:
        yield dict(asked)
    elif kinds != ["string"]:
        yield {"type": [kind for kind in kinds if kind != "string"]}


def _together(schemas: Sequence[Json], root: Mapping[str, Any]) -> Json | None:
    """One schema that allows what any of them does, with the definitions that it needs."""
    if not schemas:
        return None
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}
    refs = set(_refs(schema))
    if not refs:
        return schema
    definitions = {name: root[name] for name in DEFINITIONS if name in root}
    for ref in {*refs, *_refs(definitions)}:
        if not any(ref.startswith(f"#/{name}/") for name in DEFINITIONS):
            raise RequestError("$ref", got=repr(ref)[:60], wanted="#/$defs/NAME: parameters stand apart in a call")
    return {**schema, **definitions}


def _refs(node: Any) -> Iterator[str]:
    """Every `$ref` in a schema. An enumeration that holds such an object counts as well, which does no harm."""
    if isinstance(node, Mapping):
        yield from [node["$ref"]] if isinstance(node.get("$ref"), str) else []  # a property may be called so
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from _refs(value)


def literal(text: str) -> str:
    """A text as a terminal of Lark. RequestError for one that spells the mark."""
    if DSML in text:
        raise RequestError(f"a call cannot hold {DSML}", got=repr(text)[:60])
    return json.dumps(text)
