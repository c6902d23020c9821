"""From logits to tokens, and what to show of the distribution behind one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.cache.transfer import sent
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


class Drawn:
    """Tokens of rows of logits, on their way to the host."""

    def __init__(self, found: Tensor) -> None:
        """found: int64 [3, n], tokens, marks, and whether all logits of a row are finite."""
        self.tokens = found[0]
        self._ready = None
        if found.is_cuda:
            self._found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._found.copy_(found, non_blocking=True)
            self._ready = torch.cuda.current_stream(found.device).record_event()
        else:
            self._found = found

    def read(self) -> list[Chosen]:
        """Wait for them, and for nothing that was launched behind."""
        if self._ready is not None:
            self._ready.synchronize()
        found = zip(*self._found.tolist(), strict=True)
        return [Chosen(token, mark.to_bytes(8, "little", signed=True), bool(finite)) for token, mark, finite in found]


def draw(logits: Tensor, rows: Sequence[Row]) -> Drawn:
    """Ask for a token of each of the rows of logits [n, V] FP32, of all together.

    What is drawn is a function of logits, seed and position alone, so that a request can be resumed, replayed or
    drafted.
    """
    temperatures = torch.tensor([row.asked.temperature for row in rows], dtype=torch.float64)
    keys = [row.asked.temperature > 0 and key_of(row.asked.seed, row.position) for row in rows]  # cold ones need none
    given = sent(torch.stack((temperatures.view(torch.int64), torch.tensor(keys, dtype=torch.int64))), logits.device)
    noise = given[0].view(torch.float64), given[1]
    tokens, marks, finite = sample(logits, *noise)
    held = [n for n, row in enumerate(rows) if _held(row)]
    if held:
        at = sent(torch.tensor(held), logits.device)
        own = _limited(logits[at], [rows[n] for n in held], noise[0][at])
        tokens[at] = sample(own, *(one[at] for one in noise)).tokens
    return Drawn(torch.stack((tokens, marks, finite.to(torch.int64))))


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Chosen]:
    """`draw`, and wait for it."""
    return draw(logits, rows).read() if rows else []


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
    masks = [row.mask for row in rows if row.mask is not None]
    if masks:
        given = b"".join(b"\xff" * len(masks[0]) if row.mask is None else row.mask for row in rows)
        bits = sent(torch.frombuffer(bytearray(given), dtype=torch.uint8).view(len(rows), -1), logits.device)
        logits = logits.masked_fill(~allowed(bits, logits.shape[1]), -torch.inf)
    if not any(_filters(row.asked) for row in rows):
        return logits
    asked = [row.asked for row in rows]
    counts = sent(torch.tensor([one.top_k for one in asked]), logits.device)
    shares = torch.tensor([[one.top_p for one in asked], [one.min_p for one in asked]], dtype=torch.float64)
    return filtered(logits, temperatures, counts, *sent(shares, logits.device))


def trace(logits: Tensor, token: int, candidates: int) -> Trace:
    """The distribution at temperature 1, whatever the request's own. Of equals the lower id comes first."""
    logs = torch.log_softmax(logits.double(), 0)
    probs = logs.exp()
    best = torch.topk(logs, min(candidates, len(logs))).indices.tolist()
    ranking = sorted((Candidate(i, float(probs[i]), float(logs[i])) for i in best), key=lambda c: (-c.logprob, c.id))
    return Trace(float(probs[token]), float(logs[token]), tuple(ranking), float(-(probs * logs).sum()))
