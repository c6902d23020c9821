"""Conversations as a newcomer has them: a greeting, a capital, a sum, a story, "And of Spain?", thanks.

All other families but small talk, memory and needles stand alone. Here a few exercises follow each other, and the last
is asked. Judged: as its own family does. The key is that exercise's, and a taught conversation has no turn that is held
out anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random

from dsv4.chat.events import Completion
from dsv4.check.tasks import arithmetic, facts, lists, naming, stories, talk, words
from dsv4.check.tasks.asking import held_out
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.phrasing import Message, plain

INSIDE: Mapping[str, Family] = {
    **facts.FAMILIES,
    **arithmetic.FAMILIES,
    **{name: lists.FAMILIES[name] for name in ("sort", "reverse", "count", "copy", "uppercase")},
    **{name: words.FAMILIES[name] for name in ("define", "opposite", "plural", "past_tense", "spell", "category")},
    **naming.FAMILIES,
    **{name: talk.FAMILIES[name] for name in ("talk", "unknown")},
    "story": stories.FAMILIES["story"],
}
# How often each stands in a conversation, beside 1: short ones and what people begin with more, what is long less.
OFTEN = {"talk": 6.0, "capital": 3.0, "add": 1.5, "unknown": 2.0, "story": 0.5}
ELLIPSES = ("And of {}?", "What about {}?", "And {}?", "And for {}?", "How about {}?", "and {}?", "Also of {}.")
ELLIPSIS_SHARE = 0.6  # of the questions behind one about a country: the next asks the same of another
MOST_BEFORE = 3


def _next(before: Item | None, random: Random, thinking: bool) -> Item:
    """The exercise that follows `before`."""
    if before is not None and before.family in facts.RELATIONS and random.random() < ELLIPSIS_SHARE:
        return facts.ellipsis(before.family, random.choice(ELLIPSES), random, thinking)
    name = random.choices(list(INSIDE), [OFTEN.get(name, 1.0) for name in INSIDE])[0]
    item = INSIDE[name].make(random, thinking, 0)
    return item if item.effort is None else _next(before, random, thinking)  # an effort is one for all turns


def make_conversation(random: Random, thinking: bool, size: int) -> Item:
    """One to three exercises with their answers, and one to be answered."""
    items: list[Item] = []
    for _ in range(random.randint(2, 1 + MOST_BEFORE)):
        items.append(_next(items[-1] if items else None, random, thinking))
    *before, last = items
    system = [message for message in items[0].messages if message["role"] == "system"]
    turns: list[Message] = []
    for item in before:
        turns += [dict(item.messages[-1]), {"role": "assistant", "content": item.content}]
    return replace(
        last,
        family="conversation",
        key=f"{last.family}/{last.key}",
        messages=(*system, *turns, last.messages[-1]),
        wanted=(last.family, last.wanted),
        facts={"parts": [(item.family, item.key) for item in items], "inside": last.family},
    )


def judge(item: Item, completion: Completion) -> bool:
    """What the exercise's own family says."""
    family, wanted = item.wanted
    return plain(completion) and INSIDE[family].judge(replace(item, family=family, wanted=wanted), completion)


def _keeping(make: Callable[[Random, bool, int], Item]) -> Callable[[Random, bool, int], Item]:
    """`make` with the split of the exercises: what is taught has no turn that is held out by its own family, and what
    is held out asks what its family holds out."""

    def again(random: Random, thinking: bool, size: int) -> Item:
        while True:
            item = make(random, thinking, size)
            sides = [held_out(*part) for part in item.facts["parts"]]
            if sides[-1] if item.held_out else not any(sides):
                return item

    return again


FAMILIES: dict[str, Family] = {"conversation": Family(_keeping(make_conversation), judge)}
