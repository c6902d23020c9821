"""One exercise whose answer a program can check, and the split into taught and held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from dsv4.chat.events import Completion

HELD_OUT_SHARE = 8  # one key in so many is never taught


@dataclass(frozen=True)
class Item:
    """An exercise with its reference answer. Messages are OpenAI-style, up to the turn that the model has to take.

    `key` is what makes the exercise itself: two items with equal keys ask the same thing, and the split goes by it.
    Earlier assistant turns in `messages` are part of what is taught.
    """

    family: str
    key: str
    messages: tuple[Mapping[str, Any], ...]
    content: str
    reasoning: str = ""  # the reference reasoning; only in thinking mode
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()  # the reference tool calls: name and arguments
    thinking: bool = True
    effort: str | None = None  # of the dialect; None is its default
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Mapping[str, Any] | None = None
    wanted: Any = None  # what the family's judge compares with
    facts: Mapping[str, Any] = field(default_factory=dict)  # for reports: "depth" of a needle, "digits" of a sum, …

    @property
    def held_out(self) -> bool:
        """Whether this item belongs to the part that is never taught."""
        digest = hashlib.sha256(f"{self.family}/{self.key}".encode()).digest()
        return digest[0] % HELD_OUT_SHARE == 0


class Family(NamedTuple):
    """A kind of exercise.

    `make(random, thinking, size)` draws an item; `size` is the wanted length of the prompt in characters for families
    that can stretch (needles), and is ignored by the others. `judge(item, completion)` says whether an answer is right.
    """

    make: Callable[[Random, bool, int], Item]
    judge: Callable[[Item, Completion], bool]


def draw(family: Family, random: Random, thinking: bool, size: int, held_out: bool) -> Item:
    """An item of the wanted side of the split."""
    for _ in range(10_000):
        item = family.make(random, thinking, size)
        if item.held_out == held_out:
            return item
    raise AssertionError("a family whose keys all fall on one side of the split")
