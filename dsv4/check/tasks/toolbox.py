"""A box of tools with ways to ask for them, and the values that their arguments take.

`tools.json` holds the kinds of values, in "open" the forms of values that no list has, and the tools: what each is for,
the kinds of its parameters, how people ask for it, and what it answers. An argument is always copied out of the
question; `| on=true` behind a question states one that is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from dsv4.check.tasks.asking import table
from dsv4.check.tasks.lists import nouns
from dsv4.check.tasks.story_grammar import articles, words

TYPES = {"int": "integer", "num": "number", "bool": "boolean"}
SLOT = re.compile(r"\{(\w+)\}")
MADE_SHARE = 0.15  # of names and cities that nobody has ever heard of
OPEN_SHARE = 0.25  # of the values of a list that are not from it: who has only seen a list knows it and does not copy
Arguments = dict[str, Any]


class Use(NamedTuple):
    """One wish that one call fulfils. `question` is a template for `arguments`."""

    tool: str
    question: str
    arguments: Arguments

    @property
    def key(self) -> str:
        return f"{self.tool} {json.dumps(self.arguments)}"


def pool() -> dict[str, Any]:
    """The tools by name."""
    return dict(table("tools")["tools"])


def kind_words(name: str) -> list[str]:
    """The values of a kind that is a list."""
    return str(table("tools")["kinds"][name]).split("|")


# --- values -------------------------------------------------------------------------------------------------------


def made_up(random: Random) -> str:
    """A word that does not exist, capital first."""
    syllables = ("".join(random.choice(part) for part in ("bdfgklmnprstvz", "aeiou")) for _ in range(2))
    return ("".join(syllables) + random.choice(("", "n", "r", "s", "l"))).capitalize()


def value(kind: str, random: Random) -> Any:
    """A value of a kind: `int 1 20`, `num 1 500`, `enum a b`, `bool`, a list of tools.json, or a name below."""
    name, *limits = kind.split()
    if name in MAKERS:
        return MAKERS[name](random, *limits)
    if name == "city" and random.random() < MADE_SHARE:
        return made_up(random)
    if name in table("tools")["open"] and random.random() < OPEN_SHARE:
        return _unlisted(name, random)
    return random.choice(kind_words(name))


def _unlisted(name: str, random: Random) -> str:
    """A value of a kind, made of nouns and words that do not exist."""
    noun, other = random.sample(nouns(), 2)
    slots = {"noun": noun, "other": other, "Noun": noun.capitalize(), "Other": other.capitalize()}
    return articles(str(random.choice(table("tools")["open"][name])).format(**slots, Made=made_up(random)))


def _integer(random: Random, low: str, high: str) -> int:
    return random.randint(int(low), int(high))


def _number(random: Random, low: str, high: str) -> float | int:
    whole = random.randint(int(low), int(high))
    return whole if random.random() < 0.5 else whole + random.randint(1, 9) / 10


def _enum(random: Random, *choices: str) -> str:
    return random.choice(choices)


def _bool(random: Random) -> bool:
    return random.random() < 0.5


def _date(random: Random) -> str:
    return f"{random.randint(2024, 2030)}-{random.randint(1, 12):02}-{random.randint(1, 28):02}"


def _time(random: Random) -> str:
    return f"{random.randint(0, 23):02}:{random.choice(range(0, 60, 5)):02}"


def _code(random: Random) -> str:
    return random.choice("ABCDEFGHKLMNPRSTUVWXYZ") + str(random.randint(100, 9999))


def _first_name(random: Random) -> str:
    if random.random() < MADE_SHARE:
        return made_up(random)
    return random.choice(words("girls") + words("boys"))


def _person(random: Random) -> str:
    return _first_name(random) + (f" {value('last', random)}" if random.random() < 0.4 else "")


def _email(random: Random) -> str:
    return f"{_first_name(random).lower()}@{value('domain', random)}"


def _path(random: Random) -> str:
    number = random.choice(("", str(random.randint(1, 99))))
    return f"{value('file', random)}{number}.{random.choice(('txt', 'md', 'pdf'))}"


def _expression(random: Random) -> str:
    terms = [str(random.randint(2, 999)) for _ in range(random.choice((2, 2, 3)))]
    return terms[0] + "".join(f" {random.choice('+-*/')} {term}" for term in terms[1:])


MAKERS: Mapping[str, Any] = {
    "int": _integer, "num": _number, "enum": _enum, "bool": _bool, "date": _date, "time": _time, "code": _code,
    "person": _person, "email": _email, "path": _path, "expression": _expression, "made": made_up,
}  # fmt: skip


# --- schemas and wishes -------------------------------------------------------------------------------------------


def schema(name: str) -> Mapping[str, Any]:
    """The tool as OpenAI-style requests state it."""
    tool = pool()[name]
    parameters = {
        "type": "object",
        "properties": {key.rstrip("?"): _property(kind) for key, kind in tool["parameters"].items()},
        "required": [key for key in tool["parameters"] if not key.endswith("?")],
    }
    return {"type": "function", "function": {"name": name, "description": tool["about"], "parameters": parameters}}


def _property(kind: str) -> dict[str, Any]:
    name, *choices = kind.split()
    return {"type": TYPES.get(name, "string")} | ({"enum": choices} if name == "enum" else {})


def offered(wanted: Sequence[str], random: Random, without: Sequence[str] = ()) -> tuple[Mapping[str, Any], ...]:
    """One to four schemas in any order, the wanted ones among them and none of `without`."""
    names = list(dict.fromkeys(wanted))
    others = [name for name in pool() if name not in (*names, *without)]
    names += random.sample(others, random.randint(0 if names else 1, 4 - len(names)))
    random.shuffle(names)
    return tuple(schema(name) for name in names)


def use(name: str, random: Random) -> Use:
    """A wish for this tool. Its arguments are those that the question names, in the schema's order."""
    question, _, constants = random.choice(pool()[name]["ask"]).partition(" | ")
    given = {key: json.loads(text) for key, _, text in (part.partition("=") for part in constants.split())}
    named = set(SLOT.findall(question))
    arguments: Arguments = {}
    for key, kind in pool()[name]["parameters"].items():
        key = key.rstrip("?")
        if key in named or key in given:
            arguments[key] = given.get(key) if key in given else _fresh(kind, arguments, random)
    return Use(name, question, arguments)


def _fresh(kind: str, taken: Arguments, random: Random) -> Any:
    """A value that no other argument has: nobody flies from Rome to Rome."""
    while True:
        drawn = value(kind, random)
        if drawn not in taken.values():
            return drawn
