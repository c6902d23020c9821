"""Batches of packed rows, drawn by processes of their own, the same for a seed however many processes there are.

A document is one exercise with its answer, one definition asked for, or one passage of a text. Rows are filled with
whole documents; what a row cannot hold begins the next one, and a passage of text, cut to size, fills the gap. Every
token has a weight: what the model is to say counts fully, what others say little, and passages of text fully.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsv4.chat.control import ASSISTANT, BOS, EOS
from dsv4.chat.dialect import Dialect
from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.tasks.item import Item, draw
from dsv4.check.tasks.registry import FAMILIES
from dsv4.check.tasks.render import render
from training.corpus import definitions, documents
from training.recipes import Phase, Recipe

CHARACTERS = 3.2  # of a token of English, about
FULL = 100  # weight of a token that the model has to say
THINKING = 0.55  # share of exercises answered with reasoning
STRETCH = ("needle", "needles")  # families whose prompts take a wanted size
MADE = ("definitions", "repeats")  # neither exercises with an answer to check nor texts
QUESTIONS = ("What does {} mean?", "Define {}.", "What is the meaning of {}?", "Explain the word {}.", "define {}")


class Document(NamedTuple):
    """Token ids and how much each counts, in hundredths."""

    ids: list[int]
    weights: list[int]
    kind: int  # place in the mixture's names
    text: bool  # a passage, which may be cut


class Block(NamedTuple):
    """B rows of S + 2 tokens."""

    ids: NDArray[np.uint16]
    weights: NDArray[np.uint8]
    kinds: NDArray[np.uint8]


@dataclass(frozen=True)
class Plan:
    """What a process needs to make any block of a run."""

    mixture: Mapping[str, float]
    vocabulary: Path
    corpus: Path
    seed: int
    prompt_weight: float
    prompt_most: float
    tokens: int
    held_out: bool = False

    @classmethod
    def of(cls, recipe: Recipe, vocabulary: Path, corpus: Path) -> Plan:
        """What a recipe says."""
        weights = (recipe.prompt_weight, recipe.prompt_most)
        return cls(recipe.mixture, vocabulary, corpus, recipe.seed, *weights, recipe.tokens)


@dataclass
class Filling:
    """A block on its way: `spent`, tokens of each kind so far; `waiting`, what the row before had no room for."""

    random: Random
    width: int
    long: float  # of the phase
    shares: Mapping[str, float]
    spent: dict[str, float]
    waiting: list[Document]


class Maker:
    """Makes blocks. Each depends on the plan, its own name and its phase's form alone."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.names = plan, list(plan.mixture)
        self.tokenizer = Tokenizer.load(plan.vocabulary)
        self.dialect = Dialect.for_model(plan.vocabulary)
        names = self.tokenizer.controls
        self.bos, self.eos, self.assistant = names[BOS], names[EOS], names[ASSISTANT]
        controls = set(names.values())
        self.plain = [id for id in range(self.tokenizer.size) if id not in controls]
        texts = [name for name in self.names if name not in FAMILIES and name not in MADE]
        self.texts = {name: documents(plan.corpus, name, plan.held_out) for name in texts}
        self.meanings = definitions(plan.corpus, plan.held_out) if "definitions" in self.names else []

    def block(self, name: str, length: int, long: float = 1.0) -> Block:
        """The block of this name, for rows of `length` tokens (and two more: what follows, and what follows that)."""
        shares = {kind: share * (long if kind in STRETCH else 1.0) for kind, share in self.plan.mixture.items()}
        random, spent = Random(f"{self.plan.seed}/{name}"), dict.fromkeys(self.names, 0.0)
        filling = Filling(random, length + 2, long, shares, spent, [])
        rows = [self._row(filling) for _ in range(self.plan.tokens // length)]
        parts = zip(zip(*rows, strict=True), (np.uint16, np.uint8, np.uint8), strict=True)
        return Block(*(np.array(part, kind) for part, kind in parts))

    def _row(self, filling: Filling) -> list[list[int]]:
        """Ids, weights and kinds of one row."""
        row, width = [[], [], []], filling.width  # type: tuple[list[list[int]], int]
        while len(row[0]) < width:
            document = filling.waiting.pop() if filling.waiting else self._next(filling)
            if row[0] and not document.text and len(row[0]) + len(document.ids) > width:
                filling.waiting.append(document)
                while len(row[0]) < width:
                    passage = self._passage(filling.random)
                    filling.spent[self.names[passage.kind]] += min(len(passage.ids), width - len(row[0]))
                    _append(row, passage, width)
            else:
                _append(row, document, width)
        return row

    def _next(self, filling: Filling) -> Document:
        """A document of the kind that is furthest behind its share; a little chance keeps the order open."""
        random, spent, shares = filling.random, filling.spent, filling.shares
        kind = min(self.names, key=lambda name: (spent[name] + random.random() * 300) / shares[name])
        document = self._document(kind, filling)
        spent[kind] += len(document.ids)
        return document

    def _document(self, kind: str, filling: Filling) -> Document:
        random = filling.random
        if kind in FAMILIES:
            item = self._exercise(kind, filling)
        elif kind == "definitions":
            item = _definition(random.choice(self.meanings), random)
        elif kind == "repeats":
            return self._repeats(random)
        else:
            return self._passage(random, kind)
        ids = [id for part in render(item, self.dialect, self.tokenizer) for id in part]
        return Document(ids, self._weights(ids), self.names.index(kind), False)

    def _exercise(self, kind: str, filling: Filling) -> Item:
        """Long texts have sizes even on a logarithmic scale; the more of them a phase wants, the more fill a row."""
        random, most = filling.random, 0.85 * CHARACTERS * filling.width
        size = int(300 * (most / 300) ** random.random() ** (1 / filling.long)) if kind in STRETCH else 0
        return draw(FAMILIES[kind], random, random.random() < THINKING, size, self.plan.held_out)

    def _passage(self, random: Random, kind: str | None = None) -> Document:
        kind = kind or random.choices(list(self.texts), [self.plan.mixture[name] for name in self.texts])[0]
        ids = [self.bos, *self.tokenizer.encode_text(random.choice(self.texts[kind])), self.eos]
        return Document(ids, [FULL] * len(ids), self.names.index(kind), True)

    def _repeats(self, random: Random) -> Document:
        """Tokens by chance, several times: each can be known from the second time on, and only by looking back."""
        once = random.choices(self.plain, k=random.randint(4, 60))
        times = random.randint(2, 4)
        weights = [0] * (len(once) + 2) + [FULL] * ((times - 1) * len(once) - 1)
        return Document([self.bos, *once * times], weights, self.names.index("repeats"), True)

    def _weights(self, ids: list[int]) -> list[int]:
        """Full behind an assistant mark up to the end of its turn. A token's weight is that of being predicted."""
        least = min(self.plan.prompt_weight, self.plan.prompt_most / len(ids))
        low, speaking, out = round(FULL * least), False, []
        sentinel = False  # the opening or closing of thought behind the mark belongs to the prompt
        for id in ids:
            out.append(FULL if speaking and not sentinel else low)
            sentinel = id == self.assistant
            speaking = sentinel or (speaking and id != self.eos)
        return out


def _definition(meaning: Mapping[str, str], random: Random) -> Item:
    word = meaning["word"].replace("_", " ")
    asked = random.choice(QUESTIONS).format(word)
    article = "an" if meaning["pos"][0] in "a" else "a"
    content = f"{word[0].upper()}{word[1:]} ({article} {meaning['pos']}): {meaning['definition']}."
    if meaning.get("example"):
        content += f" For example: {meaning['example']}."
    return Item("definitions", word, ({"role": "user", "content": asked},), content, thinking=False)


def _append(row: list[list[int]], document: Document, width: int) -> None:
    room = width - len(row[0])
    for column, values in zip(row, (document.ids, document.weights, [document.kind] * len(document.ids)), strict=True):
        column += values[:room]


_maker: Maker | None = None


def _begin(plan: Plan) -> None:
    global _maker
    _maker = Maker(plan)


def _block(name: str, length: int, long: float) -> Block:
    assert _maker is not None
    return _maker.block(name, length, long)


def schedule(recipe: Recipe) -> Iterator[tuple[Phase, str]]:
    """For each step its phase and the name of its block. No block comes twice."""
    for number, phase in enumerate(recipe.phases):
        for step in range(phase.steps):
            yield phase, f"{number}/{step}"


def blocks(plan: Plan, wanted: Iterable[tuple[Phase, str]], processes: int, ahead: int = 256) -> Iterator[Block]:
    """The wanted blocks in order, made ahead of time."""
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (plan,)) as pool:
        coming = (pool.submit(_block, name, phase.length, phase.long) for phase, name in wanted)
        queue: deque[Future[Block]] = deque(islice(coming, ahead))
        while queue:
            yield queue.popleft().result()
            queue.extend(islice(coming, 1))
