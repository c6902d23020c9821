"""Lists that everybody knows: some things of a kind ("Name three birds."), and what has an order: days, numbers."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import cache
from random import Random

from dsv4.chat.events import Completion
from dsv4.check.tasks.asking import joined, named, table
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.phrasing import ask, asked, listed, plain, short
from dsv4.check.tasks.story_grammar import sentence_case
from dsv4.check.tasks.words import ALSO, lexicon
from dsv4.check.tasks.words import named as with_article

FEWEST, MOST, USUAL = 2, 5, 3
KNOWN_LEAST = 5  # words of a kind, for it to be asked for
MANY = {"furniture": "pieces of furniture", "clothing": "pieces of clothing", "food": "things to eat"}
PLURAL = r"(?<=\w)s\b"
NUMBERS = ("two", "three", "four", "five")

# --- some of a kind -----------------------------------------------------------------------------------------------

SOME = (
    "Name {n} {kind}.",
    "List {n} {kind}.",
    "Tell me {n} {kind}.",
    "Give me a list of {n} {kind}.",
    "Can you name {n} {kind}?",
    "What are {n} {kind}?",
    "I need {n} {kind}.",
    "Write down {n} {kind}, please.",
    "{n} {kind}, please.",
    "Name some {kind}.",
    "List some {kind}.",
    "Which {kind} do you know?",
    "Do you know any {kind}?",
    "Give me some examples of {kind}.",
    "Tell me the names of some {kind}.",
)


@cache
def kinds() -> dict[str, tuple[str, ...]]:
    """Kind → the words of it, where there are enough."""
    found: dict[str, tuple[str, ...]] = {}
    for word, (kind, _) in lexicon()["nouns"].items():
        found[kind] = (*found.get(kind, ()), word)
    return {kind: some for kind, some in found.items() if len(some) >= KNOWN_LEAST and kind != "weather"}


def make_some(random: Random, thinking: bool, size: int) -> Item:
    """A few things of a kind, so many as are asked for."""
    kind, which = random.choice(list(kinds())), random.randrange(len(SOME))
    counted = "{n}" in SOME[which]
    number = random.randint(FEWEST, MOST) if counted else USUAL
    chosen = random.sample(kinds()[kind], number)
    said = random.choice((str(number), NUMBERS[number - FEWEST]))
    many = MANY.get(kind, f"{kind}s")
    question = ask(SOME[which], random, n=said, kind=many)
    content = sentence_case(f"{listed([with_article(word) for word in chosen])}.")
    return Item(
        "name_some",
        f"{kind}|{number}|{which}|{thinking}",
        asked(question, random),
        content,
        f"The user wants {NUMBERS[number - FEWEST]} {many}. I know {joined(chosen)}." if thinking else "",
        thinking=thinking,
        wanted={"kind": kind, "number": number if counted else None},
    )


def judge_some(item: Item, completion: Completion) -> bool:
    """As many different things of the kind as were asked for, and nothing of another kind."""
    kind, number = item.wanted["kind"], item.wanted["number"]
    right = {word for word, (own, _) in lexicon()["nouns"].items() if own == kind or kind in ALSO.get(own, ())}
    content = completion.content.lower()
    found = named(f"{content} {re.sub(PLURAL, '', content)}", lexicon()["nouns"])
    return short(completion) and found <= right and (len(found) == number if number else len(found) >= FEWEST)


# --- what has an order --------------------------------------------------------------------------------------------

ORDERS = {
    "days": (
        "Name the days of the week.",
        "What are the days of the week?",
        "List the seven days of the week.",
        "Which days does a week have?",
        "Tell me all days of the week in order.",
        "Say the days of the week.",
    ),
    "months": (
        "Name the months of the year.",
        "What are the months of the year?",
        "List all months.",
        "Which months does a year have?",
        "Tell me the twelve months in order.",
        "Say the months of the year.",
    ),
    "seasons": (
        "Name the seasons.",
        "What are the four seasons?",
        "List the seasons of the year.",
        "Which seasons are there?",
        "Tell me the seasons of the year.",
    ),
    "planets": (
        "Name the planets.",
        "What are the planets of the solar system?",
        "List the planets from the sun.",
        "Which planets are there?",
        "Tell me the eight planets in order.",
    ),
    "alphabet": (
        "Say the alphabet.",
        "What are the letters of the alphabet?",
        "List the letters from A to Z.",
        "Write the alphabet.",
        "Tell me the alphabet, please.",
    ),
}
COUNTS = (
    "Count from {a} to {b}.",
    "Count up from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "Which numbers come from {a} to {b}?",
    "Write the numbers from {a} to {b}.",
    "List all numbers from {a} to {b}.",
    "Say the numbers {a} to {b}.",
    "Please count {a} to {b}.",
)
LONGEST_COUNT = 12
COUNT_SHARE = 0.5


@cache
def ordered(name: str) -> tuple[str, ...]:
    """The words of an order."""
    facts = {kind["name"]: kind["pairs"] for kind in table("simple_facts")}
    if name == "alphabet":
        return tuple(string.ascii_uppercase)
    if name == "planets":
        return tuple(facts["planets"].values())
    return tuple(facts[{"days": "day after", "months": "month after", "seasons": "seasons"}[name]])


def _count(random: Random, thinking: bool) -> tuple[str, str, Sequence[str]]:
    first = random.choice((1, 1, random.randint(0, 90)))
    last = first + random.randint(2, LONGEST_COUNT)
    if random.random() < 0.3:
        first, last = last, first
    step = 1 if last > first else -1
    question = ask(random.choice(COUNTS if step > 0 else COUNTS[:1] + COUNTS[2:]), random, a=first, b=last)
    return f"{first} to {last}", question, [str(number) for number in range(first, last + step, step)]


def make_sequence(random: Random, thinking: bool, size: int) -> Item:
    """All of an order, from its first to its last."""
    if random.random() < COUNT_SHARE:
        key, question, wanted = _count(random, thinking)
    else:
        name = random.choice(list(ORDERS))
        which = random.randrange(len(ORDERS[name]))
        key, question, wanted = f"{name}|{which}|{thinking}", ask(ORDERS[name][which], random), ordered(name)
    why = f"From {wanted[0]} to {wanted[-1]}, each once and in order." if thinking else ""
    return Item(
        "sequence", key, asked(question, random), sentence_case(f"{joined(wanted)}."), why,
        thinking=thinking, wanted=[word.lower() for word in wanted],
    )  # fmt: skip


def judge_sequence(item: Item, completion: Completion) -> bool:
    """Its words one after the other and no others."""
    said = [word for word in re.findall(r"\w+", completion.content.lower()) if word not in ("and", "then")]
    return plain(completion) and said == item.wanted


FAMILIES: dict[str, Family] = {
    "name_some": Family(make_some, judge_some),
    "sequence": Family(make_sequence, judge_sequence),
}
