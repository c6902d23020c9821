"""Greedy answers to many held-out prompts in one way, with the best logits behind every token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from dsv4.chat.dialect import Dialect
from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.compare.record import shaken
from dsv4.check.compare.way import Way
from dsv4.check.evaluate import planned
from dsv4.check.questions import Voice, questions
from dsv4.check.score import Row
from dsv4.check.tasks.registry import FAMILIES
from dsv4.config import ModelConfig
from dsv4.engine.request import Sampling
from dsv4.errors import PromptError, RequestError
from dsv4.llm import LLM

BEST: Final = 5  # logits that are kept of each position
LONG: Final = 1024  # tokens of a prompt where a family can stretch: enough for the embedded indexer to have to choose


class Asked(NamedTuple):
    """A prompt, and the row of `dsv4 eval` that it is of."""

    row: Row
    prompt: tuple[int, ...]


class Token(NamedTuple):
    """One token of an answer. best: ids and log-probabilities of the `BEST` most probable, the token itself first.

    Log-probabilities of a position are its logits, all less one number: their differences are those of the logits.
    """

    id: int
    best: tuple[tuple[int, float], ...]


Answer = tuple[Token, ...]


@dataclass(frozen=True)
class Work:
    """What is asked of whom: `tokens` of an answer at most, `sequences` at once unless the way says how many."""

    model: Path
    prompts: tuple[tuple[int, ...], ...]
    tokens: int
    sequences: int

    @property
    def context(self) -> int:
        """Positions that every prompt and answer fit into."""
        return max(map(len, self.prompts)) + self.tokens

    @property
    def digest(self) -> str:
        """Of the prompts and the answers' length: equal for equal work."""
        return hashlib.sha256(repr((self.prompts, self.tokens)).encode()).hexdigest()


def draw(model: Path, count: int, tokens: int, seed: int) -> list[Asked]:
    """`count` held-out prompts of all families, as `dsv4 eval` asks them, the same for the same seed.

    Left out are those that the model's dialect cannot ask, or that leave no room for an answer of `tokens`.
    RequestError where fewer are left.
    """
    config = ModelConfig.load(model)
    voice = Voice(Dialect.for_model(model), Tokenizer.load(model, config.vocab_size))
    rows = planned([], [LONG])
    each = -(-count // len(rows))
    drawn = [asked for row in rows for asked in _of(row, voice, each + 1, seed)]
    fit = [asked for asked in drawn if len(asked.prompt) + tokens <= config.max_position_embeddings]
    Random(seed).shuffle(fit)
    if len(fit) < count:
        raise RequestError("--answers: held-out prompts", got=f"{len(fit)} for this model", wanted=count)
    return fit[:count]


def _of(row: Row, voice: Voice, items: int, seed: int) -> list[Asked]:
    try:
        return [Asked(row, one.prompt) for one in questions(row, FAMILIES[row.family], voice, items, seed)]
    except PromptError:
        return []


def answer(work: Work, way: Way, jobs: int = 1) -> list[Answer]:
    """The answer to each prompt, in `jobs` processes: no answer depends on which others run beside it.

    RequestError for a way that no engine runs in, NumericsError where logits are not finite.
    """
    shares = [replace(work, prompts=work.prompts[n::jobs]) for n in range(min(jobs, len(work.prompts)))]
    if len(shares) == 1:
        return _answer(way, work)
    with ProcessPoolExecutor(len(shares), get_context("spawn")) as pool:
        dealt = list(pool.map(partial(_answer, way), shares))
    return [one for one in chain.from_iterable(zip_longest(*dealt)) if one is not None]


def _answer(way: Way, work: Work) -> list[Answer]:
    llm = LLM.load(work.model, way.options(work.context, work.sequences))
    if way.shaken:
        embedding = llm.engine._runner.model.embedding
        embedding.copy_(shaken(embedding))  # in place: a graph that was captured reads it where it is
    return tell(llm, work.prompts, work.tokens)


def tell(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
    """Greedy answers to all prompts, as many at once as the engine has slots."""
    asked = Sampling(temperature=0, max_tokens=tokens, trace=tokens, candidates=BEST)
    told: dict[int, list[Token]] = {llm.engine.add(prompt, asked): [] for prompt in prompts}
    while llm.engine.busy:
        for delta in llm.engine.step():
            if delta.error:
                raise delta.error
            assert delta.trace is not None
            best = tuple((one.id, one.logprob) for one in delta.trace.ranking)
            told[delta.number].append(Token(delta.token, best))
    return [tuple(answer) for answer in told.values()]
