"""Guessing the next tokens with the one-layer draft, so that one step of the model can confirm several.

A guess is kept when it is the token that the model itself chooses there. The model's bits do not depend on how many
tokens share a step, and its choice is a function of logits, seed and position: so the answer is the same, to the bit,
with and without a draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.cache.store import AnyLayer
from dsv4.engine.choose import Row, choose
from dsv4.engine.request import Request
from dsv4.model.batch import Segment
from dsv4.model.mtp import Mtp


class Confirmed(NamedTuple):
    """Positions start .. end - 1 that a step ran and the model stands by; `first`: of its tokens, that at `start`."""

    request: Request
    start: int
    end: int
    first: int


class Drafter:
    """Proposes `count` tokens for each request whose next token is known."""

    def __init__(self, mtp: Mtp, store: AnyLayer, count: int) -> None:
        self.mtp, self.store, self.count = mtp, store, count

    def propose(self, confirmed: Sequence[Confirmed], streams: Tensor) -> None:
        """Take in what was confirmed, then set `request.draft` of those that have sampled their next token and go on.

        streams: [T, M, d] of the step's tokens.
        Behind a prefix that an earlier request left, the draft's window ends with a row that saw that request's next
        token: a guess may differ for it, an answer cannot.
        """
        segments = [Segment(c.request.slot, c.start, c.request.tokens(c.start + 1, c.end + 1)) for c in confirmed]
        rows = [c.first + n for c in confirmed for n in range(c.end - c.start)]
        streams = self._run(streams[rows], segments)
        ends = torch.tensor([c.end - c.start for c in confirmed]).cumsum(0) - 1
        going = [(n, c) for n, c in enumerate(confirmed) if c.request.finish is None]
        asking = [(n, c.request) for n, c in going if c.end == c.request.length - 1]
        requests = [request for _, request in asking]
        streams = streams[ends[[n for n, _ in asking]]]
        guesses: list[tuple[int, ...]] = [() for _ in asking]
        for step in range(self.count if asking else 0):
            if step:  # the draft goes on from its own streams and its own guess
                ahead = [Segment(r.slot, r.length + step - 2, g[-1:]) for r, g in zip(requests, guesses, strict=True)]
                streams = self._run(streams, ahead)
            chosen = choose(self.mtp.logits(streams), [Row(r.sampling, r.length + step) for r in requests])
            guesses = [(*guess, one.token) for guess, one in zip(guesses, chosen, strict=True)]
        for request, guess in zip(requests, guesses, strict=True):
            request.draft = guess[: request.limit - request.length - 1]  # the model adds a token of its own

    def _run(self, streams: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Each segment's ids are the tokens *after* its positions."""
        batch = self.mtp.main.batch(segments)
        return self.mtp(streams, batch.ids, batch, self.store)
