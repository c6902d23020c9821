"""From logits to a token, and what to show of the distribution behind it."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from dsv4.engine.request import Candidate, Sampling, Trace
from dsv4.ops.sample import sample

RANKING = 5  # candidates shown by a trace


def choose(logits: Tensor, asked: Sampling, position: int) -> int:
    """The token at `position` from logits [V].

    The uniform number is a function of seed and position alone, so that a request can be resumed, replayed or drafted.
    """
    u = random.Random(f"{asked.seed}/{position}").random()
    return sample(logits, u, asked.temperature, asked.top_k, asked.top_p, asked.min_p)


def trace(logits: Tensor, token: int) -> Trace:
    """The distribution at temperature 1, whatever the request's own."""
    logs = torch.log_softmax(logits.double(), 0)
    best = torch.topk(logs, min(RANKING, len(logs)))
    ranking = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    entropy = float(-(logs.exp() * logs).sum())
    return Trace(float(logs[token].exp()), tuple(Candidate(i, p) for i, p in ranking), entropy)
