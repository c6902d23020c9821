"""What was asked for, and how far it has come. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dsv4.engine.stop import StopText
from dsv4.errors import DSV4Error, RequestError

_RANGES: Mapping[str, tuple[float, float]] = {"temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1)}
_COUNTS: Mapping[str, tuple[int, int]] = {
    "top_k": (0, 1 << 31),
    "max_tokens": (1, 1 << 31),
    "trace": (0, 1 << 31),
    "candidates": (0, 100),
}
MAX_BIAS = 100.0


class Matcher(Protocol):
    """Where one answer stands in its grammar (`chat.grammar.Matcher`)."""

    def mask(self) -> bytes | None:
        """Tokens that may come next, one bit each, the lowest of a byte first; None for any. May raise RequestError."""

    def accept(self, token: int) -> bool:
        """Take in the next token; whether the answer is whole, so that nothing can follow."""


class Grammar(Protocol):
    """What an answer is held to (`chat.grammar.Grammar`)."""

    def start(self) -> Matcher:
        """For one answer."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen and when to stop. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    `logit_bias`: pairs of a token id and what is added to its logit before anything else, -100 to 100.
    `grammar` says which tokens may come at all; what else is said here chooses among these.
    The same `seed` gives the same tokens for the same prompt, whatever else is running. RequestError out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    trace: int = 0  # first steps whose distribution is reported
    candidates: int = 5  # most probable tokens that such a report names

    def __post_init__(self) -> None:
        for kind, ranges in ((int | float, _RANGES), (int, _COUNTS)):
            for name, (low, high) in ranges.items():
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                    wanted = f"a {'whole ' if kind is int else ''}number from {low} to {high}"
                    raise RequestError(name, got=repr(value), wanted=wanted)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop", got=repr(self.stop), wanted="a tuple of strings of at least one character")
        _check_bias(self.logit_bias)


def _check_bias(pairs: tuple[tuple[int, float], ...]) -> None:
    for id, amount in pairs:
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not -MAX_BIAS <= amount <= MAX_BIAS:
            raise RequestError("logit_bias", got=f"{amount!r} for token {id}", wanted="a number from -100 to 100")
    ids = [id for id, _ in pairs]
    if not all(type(id) is int and id >= 0 for id in ids) or len(set(ids)) < len(ids):
        raise RequestError("logit_bias", got=repr(ids)[:60], wanted="token ids, each once")


class TextStream(Protocol):
    """Turns ids into text, whole characters only (`chat.detokenize.Detokenizer`)."""

    def push(self, id: int) -> str:
        """Text that became certain with this id."""

    def finish(self) -> str:
        """What is left at the end."""


@dataclass(eq=False)
class Request:
    """One sequence: prompt, output so far, and where its state lives."""

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    limit: int  # tokens, prompt and output, that it can come to
    text: TextStream
    stop_text: StopText
    matcher: Matcher | None = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)  # of the cache, for all that has run; none while it waits
    done: int = 0  # tokens whose state is in the cache, or will be when what was launched has run
    flying: int = 0  # further tokens that were asked for and not read yet
    output: list[int] = field(default_factory=list)
    draft: tuple[int, ...] = ()  # guesses at the next tokens, to be verified
    finish: str | None = None
    held: bool = False  # takes no part in steps, and gives its slot to whoever waits for one
    hash: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))  # of the logits of its tokens
    cached: int | None = None  # tokens that need not run when it was first admitted
    # What the scheduler knows of it.
    since: int = 0  # the step in which it was queued or admitted
    reached: int = 0  # the most tokens that it had done when it was turned out
    names: list[bytes] = field(default_factory=list)  # of the prefixes of whole pages
    shared: int = 0  # first pages that are known to all
    point: int | None = None  # where its state was kept when it was admitted
    stops: set[int] = field(default_factory=set)  # lengths at which its state is to be kept

    @property
    def length(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def coming(self) -> int:
        """Tokens that there will be when those in flight are read."""
        return self.length + self.flying

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens at positions start .. end - 1."""
        return [
            *self.prompt[start:end],
            *self.output[max(start - len(self.prompt), 0) : max(end - len(self.prompt), 0)],
        ]


@dataclass(frozen=True)
class Candidate:
    """A token, its probability at temperature 1, and the natural logarithm of that, which does not run into 0."""

    id: int
    probability: float
    logprob: float


@dataclass(frozen=True)
class Trace:
    """The distribution behind one step: the chosen token's probability, the most probable ones, entropy in nats.

    It is the model's own, at temperature 1, before bias and filters.
    """

    probability: float
    logprob: float
    ranking: tuple[Candidate, ...]
    entropy: float


NONE = -1  # no token: no id is negative


@dataclass(frozen=True)
class Delta:
    """What one step gave one request. `text` lags behind `token` while a character or a stop string may be unfinished.

    finish: None while it runs; "stop" (end of sentence or of the grammar), "role_token" (a token that must not appear
    inside a turn), "stop_string", "length" (max_tokens), "context" (no room left), "error". The last brings no token
    (`token` is NONE) and `error` says why; other requests are not touched by it.
    cached: in the first delta, tokens of the prompt that were taken from an earlier request; 0 in all others.
    hash: in the last delta (but for "error"), 32 hexadecimal digits that depend on every bit of the logits [V] behind
    each of the answer's tokens, and on nothing else.
    """

    number: int
    token: int
    text: str
    finish: str | None = None
    trace: Trace | None = None
    error: DSV4Error | None = None
    cached: int = 0
    hash: str | None = None
