"""From logits to tokens, and what to show of the distribution behind one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.engine.request import Candidate, Sampling, Trace
from dsv4.ops.sample import allowed, biased, filtered, key_of, sample


class Row(NamedTuple):
    """Whose token at which position a row of logits is asked for, among those that `mask` (`Matcher`) allows."""

    asked: Sampling
    position: int
    mask: bytes | None = None


class Chosen(NamedTuple):
    """mark: eight bytes that depend on all bits of the row. finite: whether all its logits are."""

    token: int
    mark: bytes
    finite: bool


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Chosen]:
    """A token of each of the rows of logits [n, V] FP32, which are looked at together: the device is waited for once.

    What is drawn is a function of logits, seed and position alone, so that a request can be resumed, replayed or
    drafted.
    """
    return read(launch(logits, rows)) if rows else []


def launch(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Tokens, marks and whether all is finite, [3, n] int64 where the logits are: what `read` takes.

    The device is not waited for where temperature and seed alone say which token it is. There is at least one row.
    """
    temperatures = torch.tensor([row.asked.temperature for row in rows], dtype=torch.float64)
    keys = torch.tensor([key_of(row.asked.seed, row.position) for row in rows])
    draw = _copied(torch.stack((temperatures.view(torch.int64), keys)), logits.device)
    tokens, marks, finite = sample(logits, *draw)
    held = [n for n, row in enumerate(rows) if _held(row)]
    if held:
        own = _limited(logits[held], [rows[n] for n in held], draw[0][held])
        tokens[held] = sample(own, *(one[held] for one in draw)).tokens
    return torch.stack((tokens, marks, finite.to(torch.int64)))


def read(found: Tensor) -> list[Chosen]:
    """What `launch` has found, once the device has."""
    return [
        Chosen(t, mark.to_bytes(8, "little", signed=True), bool(f)) for t, mark, f in zip(*found.tolist(), strict=True)
    ]


def _copied(given: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Temperatures as FP64 and keys, both of which are given as int64 [2, n]: one copy, which waits for no step."""
    if device.type == "cuda":
        given = given.pin_memory()
    temperatures, keys = given.to(device, non_blocking=True).unbind()
    return temperatures.view(torch.float64), keys


def _held(row: Row) -> bool:
    """Whether anything but temperature and seed says which token it is."""
    return bool(row.asked.logit_bias) or row.mask is not None or _filters(row.asked)


def _filters(asked: Sampling) -> bool:
    return asked.temperature > 0 and (asked.top_k > 0 or asked.top_p < 1 or asked.min_p > 0)


def _limited(logits: Tensor, rows: Sequence[Row], temperatures: Tensor) -> Tensor:
    """Rows of logits, [n, V], with their biases, and minus infinity for what masks and filters leave out."""
    for own, row in zip(logits, rows, strict=True):
        if row.asked.logit_bias:
            own.copy_(biased(own, row.asked.logit_bias))
        if row.mask is not None:
            ids = allowed(row.mask, own)
            own.copy_(torch.full_like(own, -torch.inf).index_copy_(0, ids, own[ids]))
    if not any(_filters(row.asked) for row in rows):
        return logits
    asked = [row.asked for row in rows]
    counts = torch.tensor([one.top_k for one in asked], device=logits.device)
    shares = torch.tensor([(one.top_p, one.min_p) for one in asked], dtype=torch.float64, device=logits.device)
    return filtered(logits, temperatures, counts, *shares.unbind(1))


def trace(logits: Tensor, token: int, candidates: int) -> Trace:
    """The distribution at temperature 1, whatever the request's own. Of equals the lower id comes first."""
    logs = torch.log_softmax(logits.double(), 0)
    probs = logs.exp()
    best = torch.topk(logs, min(candidates, len(logs))).indices.tolist()
    ranking = sorted((Candidate(i, float(probs[i]), float(logs[i])) for i in best), key=lambda c: (-c.logprob, c.id))
    return Trace(float(probs[token]), float(logs[token]), tuple(ranking), float(-(probs * logs).sum()))
