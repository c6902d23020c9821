"""From logits to a token, and what to show of the distribution behind it."""

from __future__ import annotations

import random
from functools import cache

import torch
from torch import Tensor

from dsv4.engine.request import Candidate, Sampling, Trace
from dsv4.ops.sample import allowed, biased, sample


def choose(logits: Tensor, asked: Sampling, position: int, mask: bytes | None = None) -> int:
    """The token at `position` from logits [V], one of those that `mask` (`engine.request.Matcher`) allows.

    The uniform number is a function of seed and position alone, so that a request can be resumed, replayed or drafted.
    """
    if asked.logit_bias:
        logits = biased(logits, asked.logit_bias)
    u = random.Random(f"{asked.seed}/{position}").random()
    if mask is None:
        return sample(logits, u, asked.temperature, asked.top_k, asked.top_p, asked.min_p)
    ids = allowed(mask, logits)
    return int(ids[sample(logits[ids], u, asked.temperature, asked.top_k, asked.top_p, asked.min_p)])


def fingerprints(logits: Tensor) -> list[bytes]:
    """Of each row of logits [n, V] FP32, eight bytes that depend on all its bits, and on no order of adding.

    The sum over i of bits_i * (2 i + 1) * 0x9E3779B97F4A7C15 modulo 2^64, little-endian; bits_i as a signed integer.
    An odd factor loses nothing, so that no change of a single number goes unseen.
    """
    totals = (logits.float().contiguous().view(torch.int32) * _odd(logits.shape[1], logits.device)).sum(1)
    return [total.to_bytes(8, "little", signed=True) for total in totals.tolist()]


@cache
def _odd(count: int, device: torch.device) -> Tensor:
    """The factors of `fingerprints`, INT64: for every token the same."""
    return torch.arange(1, 2 * count, 2, device=device) * -0x61C8864680B583EB


def trace(logits: Tensor, token: int, candidates: int) -> Trace:
    """The distribution at temperature 1, whatever the request's own. Of equals the lower id comes first."""
    logs = torch.log_softmax(logits.double(), 0)
    probs = logs.exp()
    best = torch.topk(logs, min(candidates, len(logs))).indices.tolist()
    ranking = sorted((Candidate(i, float(probs[i]), float(logs[i])) for i in best), key=lambda c: (-c.logprob, c.id))
    return Trace(float(probs[token]), float(logs[token]), tuple(ranking), float(-(probs * logs).sum()))
