"""An engine over a model made of arithmetic: no weights, and every step checked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dsv4.engine.choose import Row, choose
from dsv4.engine.engine import Engine
from dsv4.engine.request import Delta, Request, Sampling
from dsv4.engine.runner import Ran
from dsv4.engine.scheduler import Work
from dsv4.engine.speculate import Confirmed
from dsv4.model.batch import Unread
from tests.ran import joined
from tests.synthetic import crc

EOS, ROLE, VOCABULARY = 1, 2, 128
PAGE = 8
GREEDY = Sampling(temperature=0, max_tokens=20)


class Letters:
    """Ids are characters; a multiple of 7 is half of one and comes out with the next."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, id: int) -> str:
        self.held += chr(id)
        return "" if id % 7 == 0 else self.finish()

    def finish(self) -> str:
        held, self.held = self.held, ""
        return held


class Arithmetic:
    """A runner whose next token is a function of all tokens so far, and which checks what it is asked to run."""

    def __init__(
        self,
        answer: Sequence[int] | None = None,
        slots: int = 2,
        capacity: int = 64,
        pages: int | None = None,
        points: int = 5,
    ) -> None:
        """A cache of `pages` pages (None: enough for all slots) of PAGE tokens, and `points` states."""
        count = slots * -(-capacity // PAGE) if pages is None else pages
        self.store = SimpleNamespace(
            lengths=[0] * slots,
            capacity=capacity,
            page=PAGE,
            page_count=count,
            points=points,
            reset=self.reset,
            assign=self.assign,
            keep=self.keep,
            restore=self.restore,
            rewind=self.rewind,
        )
        self.tables: list[tuple[int, ...]] = [()] * slots
        self.pages: list[list[int]] = [[] for _ in range(count)]  # what was last written into each
        self.kept: dict[int, list[int]] = {}
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCABULARY))
        self.answer, self.slots, self.steps = answer, [[] for _ in range(slots)], []  # type: ignore[var-annotated]
        self.made = Ran(torch.zeros(0), torch.zeros(0))

    def rewind(self, slot: int, mark: int) -> None:
        del self.slots[slot][mark:]

    def reset(self, slot: int, length: int) -> None:
        self.slots[slot] = [-1] * length

    def assign(self, slot: int, pages: Sequence[int]) -> None:
        self.tables[slot] = tuple(pages)

    def keep(self, point: int, slot: int, length: int) -> None:
        self.kept[point] = self.slots[slot][:length]

    def restore(self, point: int, slot: int, length: int) -> None:
        """The state is that of the tokens that the pages hold, and what is no full page comes with it."""
        self.slots[slot] = list(self.kept[point])
        assert len(self.slots[slot]) == length
        self._write(slot, length // PAGE * PAGE)
        self._check(slot)

    def _write(self, slot: int, start: int) -> None:
        seen = self.slots[slot]
        for first in range(start // PAGE * PAGE, len(seen), PAGE):
            self.pages[self.tables[slot][first // PAGE]] = seen[first : first + PAGE]

    def _check(self, slot: int) -> None:
        """Nobody else has written into the pages of this slot."""
        seen = self.slots[slot]
        for number, first in enumerate(range(0, len(seen), PAGE)):
            held = self.pages[self.tables[slot][number]]
            assert held[: len(seen) - first] == seen[first : first + PAGE]

    def run(self, work: Sequence[Work], unread: Unread | None = None) -> Ran:
        """As the real one's, with the steps in order; what the last has made is spoilt, as a graph's outputs are."""
        for w in work:
            self.assign(w.request.slot, w.request.pages)
        self.steps.append([(w.request.number, w.end - w.start) for w in work])
        tokens = torch.tensor([token for item in work for token in item.tokens])
        if unread is not None:
            assert not tokens[unread.places].any()
            tokens[unread.places] = unread.ids
        for one in self.made:
            one.fill_(torch.nan)
        parts = tokens.split([item.size for item in work])
        self.made = joined(self._one(item, part.tolist()) for item, part in zip(work, parts, strict=True))
        return self.made

    def _one(self, item: Work, tokens: list[int]) -> Ran:
        request, seen = item.request, self.slots[item.request.slot]
        assert len(seen) == item.start
        self._check(request.slot)
        seen += tokens
        self._write(request.slot, item.start)
        known = [*request.prompt, *request.output]
        assert seen[: len(known)] == known[: item.end]
        assert seen[item.end :] == list(item.draft)
        assert item.end - len(known) <= 1
        assert len(seen) <= self.store.capacity
        ends = range(item.end, item.end + len(item.draft) + 1) if item.sample else ()
        rows = [self.logits(seen[:end], end - len(request.prompt)) for end in ends]
        return Ran(torch.zeros(len(item.tokens), 1, 1), torch.stack(rows) if rows else torch.zeros(0, VOCABULARY))

    def logits(self, seen: list[int], place: int) -> Tensor:
        if self.answer is not None:
            return torch.nn.functional.one_hot(torch.tensor(self.answer[place]), VOCABULARY).float()
        drawn = 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(crc(bytes(seen))))
        return drawn.index_fill(0, torch.arange(10), -30)  # no control token


class Guesses:
    """A drafter that is right for as many tokens as it draws, then wrong."""

    def __init__(self, runner: Arithmetic, count: int, draw: random.Random) -> None:
        self.runner, self.count, self.draw = runner, count, draw

    def propose(self, confirmed: Sequence[Confirmed], streams: Tensor) -> None:
        for one in confirmed:
            request = one.request
            assert one.end == request.done <= request.length - 1 or one.end < len(request.prompt)
            if one.end == request.length - 1:
                request.draft = tuple(self._guess(request))[: request.limit - request.length - 1]

    def _guess(self, request: Request) -> Iterator[int]:
        seen, right = [*request.prompt, *request.output], self.draw.randint(0, self.count)
        for number in range(self.count):
            row = self.runner.logits(seen, len(seen) - len(request.prompt))
            (chosen,) = choose(row.unsqueeze(0), [Row(request.sampling, len(seen))])
            seen.append(chosen.token if number < right else 9)
            yield seen[-1]


def engine(
    runner: Arithmetic, chunk: int = 8, drafter: Guesses | None = None, turn: int = 512, ahead: bool = False
) -> Engine:
    return Engine(runner, chunk, EOS, {ROLE, 3}, Letters, drafter, turn=turn, ahead=ahead)  # type: ignore[arg-type]


def finish(made: Engine) -> dict[int, list[Delta]]:
    """Run to the end: deltas by request."""
    found: dict[int, list[Delta]] = {}
    for _ in range(1000):
        if not made.busy:
            return found
        for delta in made.step():
            found.setdefault(delta.number, []).append(delta)
    raise AssertionError("the engine does not come to an end")


def answer(ids: Sequence[int], sampling: Sampling = GREEDY, prompt: Sequence[int] = (9,), **given: Any) -> list[Delta]:
    """What a model that says `ids` gives one request."""
    made = engine(Arithmetic([*ids, *[100] * 100], **given))
    number = made.add(prompt, sampling)
    return finish(made)[number]


def text(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def codes(letters: str) -> list[int]:
    return [ord(letter) for letter in letters]


def splits(whole: str) -> Iterator[list[str]]:
    """Every way to cut a string into pieces."""
    for cuts in range(1 << (len(whole) - 1)):
        edges = [0, *(n for n in range(1, len(whole)) if cuts >> (n - 1) & 1), len(whole)]
        yield [whole[a:b] for a, b in pairwise(edges)]
