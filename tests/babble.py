"""Answers that only a grammar can put in order: tokens by chance."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dsv4.chat.grammar import Grammar, Grammars
from dsv4.chat.tokenizer import Tokenizer
from dsv4.engine.runner import Ran
from dsv4.engine.scheduler import Work
from dsv4.llm import LLM
from dsv4.ops.sample import allowed
from tests import PICO
from tests.ran import joined

WORDS = Tokenizer.load(PICO)
SIZE = WORDS.size
GRAMMARS = Grammars(WORDS, SIZE)
MARK = WORDS.controls["｜DSML｜"]
# Without a liking for these a string of tokens by chance would hardly ever end.
CLOSERS = [id for id in range(SIZE) if not WORDS.token_bytes(id).strip(b'"}],</')] + [WORDS.eos_id, MARK]
BYTES = [id for id in range(SIZE) if len(WORDS.token_bytes(id)) == 1]


def next_tokens(bits: bytes) -> list[int]:
    """What a mask allows."""
    found: list[int] = (
        allowed(torch.frombuffer(bytearray(bits), dtype=torch.uint8)[None], SIZE)[0].nonzero().flatten().tolist()
    )
    return found


def walk(grammar: Grammar, seed: int, longest: int = 3000, only: Sequence[int] = ()) -> tuple[bytes, bool]:
    """Bytes of an answer by chance, and whether it came to an end. Tokens of `only` are taken where there are any."""
    chance, matcher, out = random.Random(seed), grammar.start(), b""
    closers, liked = set(CLOSERS), {*only, WORDS.eos_id} if only else set()
    for _ in range(longest):
        bits = matcher.mask()
        assert bits is not None
        tokens = next_tokens(bits)
        tokens = [token for token in tokens if token in liked] or tokens
        closing = [token for token in tokens if token in closers]
        token = chance.choice(closing if closing and chance.random() < 0.3 else tokens)
        whole = matcher.accept(token)
        if token == WORDS.eos_id:
            assert whole
            return out, True
        out += WORDS.token_bytes(token)
        if whole:
            return out, True
    return out, False


@contextmanager
def babbling(llm: LLM, seed: int) -> Iterator[None]:
    """Inside the block the model says whatever chance will have.

    It does not run, so `llm` must be loaded without a draft and without points to go on from.
    """
    runner = llm.engine._runner
    assert not runner.store.points, "load it with reuse_points=0"

    def run(work: Sequence[Work], unread: object = None) -> Ran:
        return joined(Ran(torch.zeros(item.end - item.start, 1, 1), logits(item)) for item in work)

    def logits(item: Work) -> torch.Tensor:
        place = torch.Generator().manual_seed(hash((seed, item.request.sampling.seed, item.end)) % (1 << 63))
        rows = 3 * torch.randn(int(item.sample), llm.config.vocab_size, generator=place)
        rows[:, CLOSERS] += 4
        return rows

    runner.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        del runner.run
