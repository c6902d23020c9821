"""What the families with exact answers share: tables, small variations of a question, and how answers are read."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from random import Random
from typing import Any

from dsv4.check.tasks.item import Item
from dsv4.check.tasks.phrasing import shortened, typo

LEADS = (
    "Please answer: {}",
    "Hello! {}",
    "Hi. {}",
    "Question: {}",
    "Quick question: {}",
    "I have a question. {}",
    "{} Please tell me.",
    "{} Thank you.",
)


@cache
def table(name: str) -> Any:
    """The JSON file of this name beside this module. It is shared: read it, do not change it."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def pick(random: Random, words: str) -> str:
    """One of the words of a text."""
    return random.choice(words.split())


def vary(random: Random, question: str, lower: bool = True) -> str:
    """The question as some people write it: polite, without its mark, or (with `lower`) without capitals, mistyped.

    `lower` says that it has no words in small letters that have to stay as they are.
    """
    kind = random.random()
    if kind < 0.20:
        lead = random.choice(LEADS)
        ended = question.endswith((".", "?", "!"))  # what follows bare words or numbers would seem to belong to them
        return lead.format(question) if ended or lead.endswith("{}") else question
    if kind < 0.30:
        return question.rstrip("?. ")
    if kind < 0.42 and lower:
        return question.lower().rstrip("?. " if kind < 0.36 else "")
    if kind < 0.48 and lower:
        return (typo if kind < 0.44 else shortened)(question, random)
    return question


def sentence(text: str) -> str:
    """With a capital at its start, the rest kept."""
    return text[:1].upper() + text[1:]


def joined(items: Sequence[object]) -> str:
    """`a, b, c`."""
    return ", ".join(map(str, items))


def held_out(family: str, key: str) -> bool:
    """The side of the split on which this key falls."""
    return Item(family, key, (), "").held_out


def numbers(text: str) -> list[int]:
    """The whole numbers of up to 12 digits in a text; `1,234` is one number and `4.5` none."""
    found = re.findall(r"(?<![\w.])-?\d{1,12}(?:,\d{3})*(?!\w|\.\d|,\d)", text)
    return [int(number.replace(",", "")) for number in found]


def named(text: str, names: Iterable[str]) -> set[str]:
    """Those `names` that stand in the text as whole words, the longest at each place: `Guinea-Bissau`, not `Guinea`.

    Accents in the text are not looked at: `Brasília` is `Brasilia`.
    """
    letters = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return set(_any_of(frozenset(names)).findall(letters))


@lru_cache
def _any_of(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{longest_first})(?![\w-])")
