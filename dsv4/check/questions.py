"""Which held-out items are asked: the rows that families have, and the draw for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from dsv4.chat.control import THINK
from dsv4.chat.dialect import Dialect
from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.score import Row
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.render import render

SHORT: Final = 1_200  # characters asked of a family where no length is wanted; those that cannot stretch ignore it
ROOM: Final = 32  # tokens that an answer may need beyond twice the reference's
_LONG: Final = 16_000
_TRIES: Final = 10  # draws for each item wanted, before a family is taken to have no more
_SPREAD: Final = 0.94  # prompts of a context are between this share of it and the whole


@dataclass(frozen=True)
class Question:
    """An item as it is asked. An answer longer than `limit` tokens is cut off."""

    item: Item
    prompt: tuple[int, ...]
    limit: int
    in_reasoning: bool


@dataclass(frozen=True)
class Voice:
    """The words that a model is asked in."""

    dialect: Dialect
    tokenizer: Tokenizer

    def question(self, item: Item) -> Question:
        """PromptError for an item that the dialect or the tokenizer cannot express."""
        prompt, answer = render(item, self.dialect, self.tokenizer)
        return Question(item, tuple(prompt), 2 * len(answer) + ROOM, prompt[-1] == self.tokenizer.controls.get(THINK))


def modes(family: Family) -> list[bool]:
    """The modes that a family has, thinking first: one that lacks the mode asked for makes an item of the other."""
    return [thinking for thinking in (True, False) if family.make(Random(0), thinking, SHORT).thinking == thinking]


def stretches(family: Family) -> bool:
    """Whether the family's prompts grow with the length asked for."""
    item = family.make(Random(0), modes(family)[0], _LONG)
    return sum(len(str(message["content"])) for message in item.messages) > _LONG // 2


def rows(families: Mapping[str, Family], contexts: Sequence[int]) -> list[Row]:
    """All rows of the table: each family in each of its modes, and at each context length if it can stretch."""
    return [
        Row(name, thinking, context)
        for name, family in families.items()
        for thinking in modes(family)
        for context in (contexts if stretches(family) else (None,))
    ]


def questions(row: Row, family: Family, voice: Voice, items: int, seed: int) -> list[Question]:
    """`items` different held-out questions of a row, the same for the same seed.

    Different keys come first; a family that has fewer is then asked in other words. Fewer questions are returned where
    those are used up as well. PromptError if the model's dialect cannot ask them.
    """
    random = Random(f"{seed}/{row.family}/{row.context}")
    chosen: dict[tuple[int, ...], Question] = {}
    spare: dict[tuple[int, ...], Question] = {}
    keys: set[str] = set()
    for question in _drawn(row, family, voice, random, items):
        fresh = question.item.key not in keys and question.prompt not in chosen
        (chosen if fresh else spare).setdefault(question.prompt, question)
        keys.add(question.item.key)
        if len(chosen) == items:
            break
    return list((chosen | {prompt: spare[prompt] for prompt in spare if prompt not in chosen}).values())[:items]


def _drawn(row: Row, family: Family, voice: Voice, random: Random, items: int) -> Iterator[Question]:
    scale = _characters_per_token(row, family, voice)
    for _ in range(items * _TRIES):
        size = SHORT if row.context is None else int(row.context * scale * random.uniform(_SPREAD, 1))
        question = voice.question(_held_out(family, random, row.thinking, size))
        if row.context is None or len(question.prompt) <= row.context:
            yield question


def _held_out(family: Family, random: Random, thinking: bool, size: int) -> Item:
    """A held-out item, as `draw` gives, but long texts are made for few that are not: short, it has the same key."""
    for _ in range(10_000):
        start = random.random()
        item = family.make(Random(start), thinking, SHORT)
        if item.held_out and size != SHORT:
            item = family.make(Random(start), thinking, size)
        if item.held_out:
            return item
    raise AssertionError("a family whose keys are all taught")


def _characters_per_token(row: Row, family: Family, voice: Voice) -> float:
    """Of prompts as long as the row's, instructions and control tokens included; 1 where no length is wanted."""
    if row.context is None:
        return 1.0
    scale = 3.0
    for trial in range(3):
        size = int(row.context * scale)
        scale = size / len(voice.question(family.make(Random(trial), row.thinking, size)).prompt)
    return scale
