"""Lists and texts handled exactly: copied, turned round, sorted, counted, picked from, searched, put in capitals.

Asked: one operation on words of `nouns.txt`, on numbers or on a random code. Judged: the answer's items (what stands
behind its last colon) are the wanted ones in the wanted order; a copy is the same to the character. The key is the
operation with the exact list, so a held-out list was never taught for that operation in any phrasing.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from dsv4.chat.events import Completion
from dsv4.check.tasks.asking import joined, named, numbers, table, vary
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.phrasing import asked as messages_of
from dsv4.check.tasks.phrasing import plain

EXACT = ("copy", "uppercase")  # what a polite word behind the text would change
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
DIVIDER = re.compile(r"\s*(?:,\s*and\b|,|\n|\band\b)\s*")
MARK = re.compile(r"^(?:\d+[.)]|[-*])\s+")  # of a line in a list
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@cache
def nouns() -> tuple[str, ...]:
    """About 400 short common English nouns, in alphabetical order."""
    return tuple((Path(__file__).parent / "nouns.txt").read_text(encoding="utf-8").split())


def draw_words(random: Random, least: int, most: int) -> list[str]:
    """Different nouns."""
    return random.sample(nouns(), random.randint(least, most))


def _asked(random: Random, what: str, **words: str) -> str:
    return str(random.choice(table("lists")[what])).format(**words)


def _numbered(items: Sequence[object]) -> str:
    return joined([f"{n} {item}" for n, item in enumerate(items, 1)])


class Exercise(NamedTuple):
    """A drawn operation: its key, question and reasoning, the content `answer`, and what the judge compares with."""

    key: str
    question: str
    reasoning: str
    answer: str
    wanted: object


def _code(random: Random) -> str:
    alphabet = random.choice((string.digits, string.ascii_uppercase, string.ascii_lowercase + string.digits))
    groups = [random.choices(alphabet, k=random.randint(2, 6)) for _ in range(random.randint(1, 3))]
    return random.choice(("-", " ", "")).join(map("".join, groups))


def copy(random: Random, thinking: bool) -> Exercise:
    words = " ".join(random.choices(nouns(), k=random.randint(1, 12)))
    text = _code(random) if random.random() < 0.4 else random.choice((words, words.capitalize() + "."))
    question = _asked(random, "copy", l=text)
    return Exercise(text, question, "The user wants this text again, with no change.", text, text)


def reverse(random: Random, thinking: bool) -> Exercise:
    items = draw_words(random, 2, 8 if thinking else 5)
    back = items[::-1]
    order = joined([f"{n} {item}" for n, item in reversed(list(enumerate(items, 1)))])
    reasoning = f"The list: {_numbered(items)}. From the last to the first: {order}."
    return Exercise(joined(items), _asked(random, "reverse", l=joined(items)), reasoning, joined(back), back)


def _different_starts(random: Random, least: int, most: int) -> list[str]:
    """Words that their first two letters alone put in order."""
    while True:
        words = draw_words(random, least, most)
        if len({word[:2] for word in words}) == len(words):
            return words


def _sort_words(random: Random, thinking: bool) -> Exercise:
    items = _different_starts(random, 2, 6 if thinking else 4)
    letters = [joined([f"{word[0]} {word[1]} {word}" for word in some]) for some in (items, sorted(items))]
    reasoning = f"The first letters: {letters[0]}. By the alphabet: {letters[1]}."
    question = _asked(random, "sort words", l=joined(items))
    return Exercise(joined(items), question, reasoning, joined(sorted(items)), sorted(items))


def _sort_numbers(random: Random, thinking: bool) -> Exercise:
    items = random.sample(range(random.choice((10, 100, 100))), random.randint(2, 6 if thinking else 4))
    steps, left = [], list(items)
    while left:
        steps.append(f"Of {joined(left)} the smallest is {min(left)}.")
        left.remove(min(left))
    done = [str(item) for item in sorted(items)]
    return Exercise(joined(items), _asked(random, "sort numbers", l=joined(items)), " ".join(steps), joined(done), done)


def sort(random: Random, thinking: bool) -> Exercise:
    return (_sort_words if random.random() < 0.5 else _sort_numbers)(random, thinking)


def count(random: Random, thinking: bool) -> Exercise:
    if random.random() < 0.3:
        word = random.choice(nouns())
        size, unit, reasoning = len(word), "letter", f"{word}: {_numbered(word)}."
        key, question = word, _asked(random, "count letters", l=word)
    else:
        items = draw_words(random, 2, 10 if thinking else 6)
        size, unit, reasoning = len(items), "word", f"I count: {_numbered(items)}."
        key = joined(items)
        question = _asked(random, "count", l=key)
    answer = f"There are {size} {unit}s."
    return Exercise(key, question, f"{reasoning} The last number is {size}.", answer, size)


def _pick(place: str, random: Random, thinking: bool) -> Exercise:
    items = draw_words(random, 2, 8 if thinking else 6)
    index = {"first": 0, "last": len(items) - 1}.get(place, random.randrange(len(items)))
    called = ORDINALS[index] if place == "nth" else place
    question = _asked(random, "pick", n=called, l=joined(items))
    reasoning = f"The list: {_numbered(items)}. The {called} is number {index + 1}, {items[index]}."
    wanted = {"word": items[index], "list": items}
    return Exercise(
        f"{called} of {joined(items)}", question, reasoning, f"The {called} word is {items[index]}.", wanted
    )


def membership(random: Random, thinking: bool) -> Exercise:
    items = draw_words(random, 2, 8 if thinking else 6)
    there = random.random() < 0.5
    asked = random.choice(items if there else [word for word in nouns() if word not in items])
    looked = joined([f"{item} {'yes' if item == asked else 'no'}" for item in items])
    answer = f"Yes, {asked} is in the list." if there else f"No, {asked} is not in the list."
    question = _asked(random, "membership", x=asked, l=joined(items))
    return Exercise(f"{asked} in {joined(items)}", question, f"I look for {asked}: {looked}.", answer, there)


def uppercase(random: Random, thinking: bool) -> Exercise:
    items = draw_words(random, 1, 4 if thinking else 2)
    text = " ".join(items)
    spelled = ". ".join(f"{item}: {' '.join(item.upper())}" for item in items) + "."
    return Exercise(text, _asked(random, "uppercase", l=text), spelled, text.upper(), text.upper())


def judge_text(item: Item, completion: Completion) -> bool:
    """The text to the character, perhaps between quotes."""
    content = completion.content.strip()
    return plain(completion) and item.wanted in (content, content.strip("\"'`"))


def judge_items(item: Item, completion: Completion) -> bool:
    """What stands behind the last colon, divided by commas, lines or `and`, are the wanted items.

    Words before the first item are allowed, but no other noun or number.
    """
    listed = completion.content.rpartition(":")[2].strip().rstrip(".")
    parts = [MARK.sub("", part).strip() for part in DIVIDER.split(listed)]
    found = [part for part in parts if part]
    *before, first = found[0].split() if found else ["", ""]
    clean = not any(word in nouns() or word.isdigit() for word in before)
    return plain(completion) and clean and [first, *found[1:]] == item.wanted


def judge_count(item: Item, completion: Completion) -> bool:
    """The number, in digits or as a word, and no other."""
    said = [COUNTED.index(word) for word in named(completion.content.lower(), COUNTED)]
    return plain(completion) and {*numbers(completion.content), *said} == {item.wanted}


def judge_pick(item: Item, completion: Completion) -> bool:
    """The word, and no other of the list."""
    found = named(completion.content.lower(), item.wanted["list"])
    return plain(completion) and found == {item.wanted["word"]}


def judge_yes(item: Item, completion: Completion) -> bool:
    """Begins with the right one of yes and no, and does not say the other."""
    found = re.findall(r"\b(yes|no)\b", completion.content.lower())
    return plain(completion) and bool(found) and set(found) == {"yes" if item.wanted else "no"}


def _make(name: str, draw: Callable[[Random, bool], Exercise], random: Random, thinking: bool, size: int) -> Item:
    drawn = draw(random, thinking)
    question = drawn.question if name in EXACT else vary(random, drawn.question, lower=False)
    return Item(
        name,
        f"{name} {drawn.key}",
        messages_of(question, random),
        drawn.answer,
        drawn.reasoning if thinking else "",
        thinking=thinking,
        wanted=drawn.wanted,
    )


EXERCISES: dict[str, tuple[Callable[[Random, bool], Exercise], Callable[[Item, Completion], bool]]] = {
    "copy": (copy, judge_text),
    "reverse": (reverse, judge_items),
    "sort": (sort, judge_items),
    "count": (count, judge_count),
    "first": (partial(_pick, "first"), judge_pick),
    "last": (partial(_pick, "last"), judge_pick),
    "nth": (partial(_pick, "nth"), judge_pick),
    "membership": (membership, judge_yes),
    "uppercase": (uppercase, judge_text),
}
FAMILIES: dict[str, Family] = {
    name: Family(partial(_make, name, draw), judge) for name, (draw, judge) in EXERCISES.items()
}
