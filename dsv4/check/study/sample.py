"""What the study reads: held-out text and held-out exercises, dealt into disjoint samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from random import Random
from typing import Final

from dsv4.chat.dialect import Dialect
from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.tasks.item import Family, draw
from dsv4.check.tasks.render import render
from dsv4.errors import PromptError, RequestError

SHORTEST: Final = 16  # tokens that a piece of text has at least
_PROMPT_CHARACTERS: Final = 300  # asked of the families that can stretch
_TRIES: Final = 20  # draws of a family without a new item before it is left out


@dataclass(frozen=True)
class Passage:
    """Token ids of which those from `start` on are predicted. `family` "" is text, otherwise an exercise's."""

    ids: tuple[int, ...]
    start: int = 1
    family: str = ""

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Samples:
    """One list of passages an evaluation seed, and one of its own that scales are calibrated on.

    No passage is in two lists. `left_out`: families that could not be asked, and why.
    """

    seeds: tuple[tuple[Passage, ...], ...]
    calibration: tuple[Passage, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


def pieces(texts: Iterable[str], tokenizer: Tokenizer, span: int) -> list[Passage]:
    """Every text cut into passages of `span` tokens at most, each behind a begin-of-sentence token."""
    found = []
    for text in texts:
        ids = tokenizer.encode_text(text)
        for start in range(0, len(ids), span - 1):
            part = ids[start : start + span - 1]
            if len(part) >= min(SHORTEST, span) - 1:
                found.append(Passage((tokenizer.bos_id, *part)))
    return found


def deal(passages: Sequence[Passage], hands: int, tokens: int, seed: int) -> list[list[Passage]]:
    """Shuffled passages dealt to `hands`, each up to `tokens` tokens; the last one of a hand is cut to fit.

    RequestError where a hand stays empty.
    """
    order = list(passages)
    Random(f"{seed}/text").shuffle(order)
    dealt: list[list[Passage]] = [[] for _ in range(hands)]
    room = [tokens] * hands
    for number, passage in enumerate(order):
        hand = number % hands
        cut = passage.ids[: room[hand]]
        if len(cut) >= min(SHORTEST, tokens):
            dealt[hand].append(Passage(cut))
            room[hand] -= len(cut)
    if not all(dealt):
        raise RequestError("too little held-out text", got=f"{len(passages)} passages", wanted=f"at least {hands}")
    return dealt


@dataclass
class Exercises:
    """Draws held-out exercises of all families in turn, thinking and plain, no exercise twice."""

    families: Mapping[str, Family]
    dialect: Dialect
    tokenizer: Tokenizer
    span: int
    left_out: dict[str, str] = field(default_factory=dict)
    _seen: set[tuple[str, str, bool]] = field(default_factory=set)

    def hand(self, tokens: int, random: Random) -> list[Passage]:
        """Exercises of `tokens` tokens together."""
        found: list[Passage] = []
        for name in cycle(self.families):
            if len(self.left_out) == len(self.families):
                return found
            passage = None if name in self.left_out else self._draw(name, random)
            if passage is not None and len(passage.ids) > tokens:
                return found
            if passage is not None:
                found.append(passage)
                tokens -= len(passage.ids)
        return found

    def _draw(self, name: str, random: Random) -> Passage | None:
        for _ in range(_TRIES):
            item = draw(self.families[name], random, random.random() < 0.5, _PROMPT_CHARACTERS, held_out=True)
            try:
                prompt, answer = render(item, self.dialect, self.tokenizer)
            except PromptError as error:
                self.left_out[name] = error.what
                return None
            mark = (name, item.key, item.thinking)
            if len(prompt) + len(answer) <= self.span and mark not in self._seen:
                self._seen.add(mark)
                return Passage((*prompt, *answer), len(prompt), name)
        self.left_out[name] = f"no further exercise of at most {self.span} tokens"
        return None


def draw_samples(texts: Iterable[str], exercises: Exercises, seeds: int, tokens: int, seed: int) -> Samples:
    """`seeds` samples of `tokens` tokens, half of them text (all, without families), and one more for calibration."""
    of_text = tokens // 2 if exercises.families else tokens
    passages = pieces(texts, exercises.tokenizer, exercises.span)
    samples = [
        (*hand, *exercises.hand(tokens - of_text, Random(f"{seed}/exercises/{number}")))
        for number, hand in enumerate(deal(passages, seeds + 1, of_text, seed))
    ]
    return Samples(tuple(samples[1:]), samples[0], dict(exercises.left_out))
