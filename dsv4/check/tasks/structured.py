"""JSON answers: the facts of a sentence as a JSON object.

Asked: an object with given properties, by a JSON schema as the response format ("json") or by words in the prompt
("json_prompt"). Judged: the content is one JSON value, equals the wanted object type by type and satisfies the schema.
The key is the kind of sentence, its facts and the properties asked for.

`structured.json` holds kinds of sentences with their fields. A field is a list of two numbers (an integer between
them), the name of a word list (a string), `{"one of": list}`, `{"some": list}` (one to three strings), or what the
sentence says for true and for false.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from random import Random
from typing import Any

from dsv4.chat.events import Completion
from dsv4.check.tasks.asking import joined, table
from dsv4.check.tasks.facts import known
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.lists import nouns
from dsv4.check.tasks.phrasing import asked, listed, plain
from dsv4.check.tasks.story_grammar import articles

Schema = dict[str, Any]
TYPES: Mapping[str, type] = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict}
MOST_OF_SOME = 3


@cache
def _words(name: str) -> tuple[str, ...]:
    if name == "nouns":
        return nouns()
    if name == "cities":
        return tuple(country["capital"] for country in known("capital") if country["continent"] == "Europe")
    return tuple(table("structured")["words"][name].split())


def _schema(field: Any) -> Schema:
    if isinstance(field, str):
        return {"type": "string"}
    if isinstance(field, list):
        return {"type": "integer"}
    if "one of" in field:
        return {"type": "string", "enum": list(_words(field["one of"]))}
    return {"type": "array", "items": {"type": "string"}} if "some" in field else {"type": "boolean"}


def _draw(field: Any, random: Random) -> Any:
    if isinstance(field, list):
        return random.randint(*field)
    if isinstance(field, str) or "one of" in field:
        return random.choice(_words(field if isinstance(field, str) else field["one of"]))
    if "some" in field:
        return random.sample(_words(field["some"]), random.randint(1, MOST_OF_SOME))
    return random.random() < 0.5


def _said(field: Any, value: Any) -> str:
    """A value as the sentence says it."""
    if isinstance(value, bool):
        return str(field["true" if value else "false"])
    return listed(value) if isinstance(value, list) else str(value)


def object_schema(fields: Mapping[str, Any], names: list[str]) -> Schema:
    """The JSON schema of an object with exactly these properties."""
    properties = {name: _schema(fields[name]) for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _make(family: str, random: Random, thinking: bool, size: int) -> Item:
    tables = table("structured")
    kind = random.choice(list(tables["kinds"]))
    fields = tables["kinds"][kind]["fields"]
    values = {name: _draw(field, random) for name, field in fields.items()}
    said = random.choice(tables["kinds"][kind]["sentences"])
    said = articles(said.format(**{name: _said(fields[name], value) for name, value in values.items()}))
    names = random.sample(list(values), random.randint(1, len(values)))
    wanted = {name: values[name] for name in names}
    schema = object_schema(fields, names)
    question = random.choice(tables["by schema" if family == "json" else "by words"]).format(s=said, k=joined(names))
    read = "; ".join(f"{name} is {json.dumps(value)}" for name, value in wanted.items())
    return Item(
        family,
        f"{kind}|{json.dumps(values)}|{joined(names)}",
        asked(question, random),
        json.dumps(wanted, ensure_ascii=False),
        f"The user wants JSON with {joined(names)}. From the text: {read}." if thinking else "",
        thinking=thinking,
        response_format=schema if family == "json" else None,
        wanted={"object": wanted, "schema": schema},
        facts={"kind": kind, "properties": len(names)},
    )


def _fits_list(value: list[Any], schema: Schema) -> bool:
    return all(fits(one, schema.get("items", {})) for one in value)


def _fits_object(value: dict[str, Any], schema: Schema) -> bool:
    properties = schema.get("properties", {})
    allowed = schema.get("additionalProperties", True) or set(value) <= set(properties)
    right = all(fits(value[name], one) for name, one in properties.items() if name in value)
    return allowed and right and set(schema.get("required", ())) <= set(value)


INSIDE: Mapping[type, Callable[[Any, Schema], bool]] = {list: _fits_list, dict: _fits_object}


def fits(value: Any, schema: Schema) -> bool:
    """Whether a JSON value satisfies a schema made of type, enum, items, properties, required, additionalProperties."""
    if "type" in schema and type(value) is not TYPES[schema["type"]]:  # to isinstance, True is an integer
        return False
    inside = INSIDE.get(type(value))
    return ("enum" not in schema or value in schema["enum"]) and (inside is None or inside(value, schema))


def judge(item: Item, completion: Completion) -> bool:
    """The wanted object, whatever the order of its properties and its white space."""
    try:
        value = json.loads(completion.content)
    except (ValueError, RecursionError):  # no JSON, a number too long to read, brackets too deep
        return False
    return plain(completion) and fits(value, item.wanted["schema"]) and bool(value == item.wanted["object"])


FAMILIES: dict[str, Family] = {family: Family(partial(_make, family), judge) for family in ("json", "json_prompt")}
