"""Logits and the best of them, small whole numbers, whose sums are exact: many are equal. And a token of each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, FP32, INF, NAN, normal, padded
from dsv4.check.contract import Arguments, Case
from dsv4.ops.sample import Choice, Sampled, head, key_of, sample

VOCABULARY = 129_280
TEMPERATURES = (1.0, 0.0, 0.3, 2.0, 1e-250, 100.0)
PART = 2048  # logits that a block of the kernel looks at together


def cases() -> Iterator[Case]:
    yield from _heads()
    yield from _samples()


def _heads() -> Iterator[Case]:
    case = partial(Case, op=head, tokens=(0,), oracle=_exact)
    for tokens, rows, columns, k in ((1, 5, 8, 1), (3, 40, 7, 5), (2, 300, 8, 20), (0, 64, 8, 1), (2, 3, 8, 32)):
        make = partial(_whole, tokens, rows, columns, k, FP32)
        yield case(name=f"{k} of {rows}, {tokens} tokens", make=make)
    for rows in (PART, PART + 1, 2 * PART + 70):
        yield case(name=f"20 of {rows}", make=partial(_whole, 2, rows, 4, 20, FP32))
    yield case(name="equal and odd logits", make=partial(_odd, FP32))
    yield case(name="too many for one block of blocks", make=partial(_whole, 1, 70 * PART, 1, 32, FP32), size="full")
    for tokens, k in ((1, 1), (3, 20), (40, 32)):
        make = partial(_whole, tokens, 5000, 264, k, BF16)
        yield case(name=f"{k} of 5000, {tokens} tokens bf16", make=make, size="big")
    yield case(name="equal and odd logits bf16", make=partial(_odd, BF16), size="big")
    for label, width in (("flash", 4096), ("pro", 7168)):
        for tokens, k in ((1, 1), (1, 20), (16, 1), (64, 1)):
            make = partial(_whole, tokens, VOCABULARY, width, k, BF16)
            yield case(name=f"{label} {tokens}, {k} best", make=make, size="big", bench=f"{label}, {k} best")


def _exact(given: Arguments, found: Any) -> Choice:
    """FP64 products, and the best of them."""
    x, weight, k = given
    logits = (x.double() @ weight.double().T).float()
    ids = largest(logits, min(k, logits.shape[1]))
    return Choice(logits, logits.gather(1, ids), ids)


def largest(values: Tensor, k: int) -> Tensor:
    """The places of the k largest of each row, one after another, each the first of those that are left."""
    left = torch.where(values.isnan(), -INF, values)
    gone, picked = torch.zeros_like(left, dtype=torch.bool), []
    for _ in range(k):
        top = left.masked_fill(gone, -INF).amax(1, keepdim=True)
        first = ((left == top) & ~gone).int().argmax(1, keepdim=True)
        gone.scatter_(1, first, True)
        picked.append(first)
    return torch.cat(picked, 1)


def _whole(tokens: int, rows: int, columns: int, k: int, dtype: torch.dtype) -> Arguments:
    x, weight = (normal(name, n, columns, size=2).round().clamp(-4, 4) for name, n in (("x", tokens), ("head", rows)))
    return x.to(dtype), weight.to(dtype), k


def _odd(dtype: torch.dtype) -> Arguments:
    """All equal; NaN alone; one NaN; infinities of both signs beside NaN; zeros of both signs; ordinary ones."""
    x, weight, k = _whole(6, PART + 100, 8, 20, dtype)
    weight[:, 2:] = 0
    weight[10, 2], weight[PART + 5, 3], weight[77, 3], weight[500, 3] = NAN, INF, -INF, NAN
    x[0], x[1] = 0, NAN
    x[0, 2], x[0, 3], x[2, 3], x[5, 2:] = 0, 0, 0, 0
    return x, weight, k


def _samples() -> Iterator[Case]:
    case = partial(Case, op=sample, tokens=(0, 1, 2), oracle=_drawn)
    for rows, n in ((1, 1), (3, 40), (5, 1023), (2, 1024), (3, 1025), (0, 30), (7, 5000)):
        yield case(name=f"{rows} of {n}", make=partial(_rows, rows, n))
    yield case(name="equal, not finite and hidden logits", make=_odd_rows)
    yield case(name="rows apart", make=_apart)
    for rows in (1, 64):
        for name, temperature in (("warm", 1.0), ("cold", 0.0)):
            make = partial(_rows, rows, VOCABULARY, temperature)
            yield case(name=f"{name} {rows}", make=make, size="big", bench=name, oracle=None)


def _rows(rows: int, n: int, temperature: float | None = None) -> Arguments:
    """Every temperature, from none to one that all but forgets the logits."""
    temperatures = (
        torch.tensor(TEMPERATURES).repeat(rows)[:rows] if temperature is None else torch.full((rows,), temperature)
    )
    return (
        normal("logits", rows, n, size=4),
        temperatures.double(),
        torch.tensor([key_of(7, row) for row in range(rows)]).long(),
    )


def _odd_rows() -> Arguments:
    """All equal; all minus infinity; a NaN; an infinity; all but two hidden; NaN alone; each cold and warm."""
    logits = normal("odd", 6, 1500)
    logits[0], logits[1], logits[2, 1400], logits[3, 3], logits[4, 2:1490], logits[5] = 1, -INF, NAN, INF, -INF, NAN
    temperatures = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(6)
    return logits.repeat(2, 1), temperatures, torch.tensor([key_of(row, 3) for row in range(12)])


def _apart() -> Arguments:
    logits, *more = _rows(5, 700)
    return padded(logits, 5), *more


def _drawn(given: Arguments, found: Any) -> Sampled:
    """Number by number, in the whole numbers and logarithms of Python."""
    logits, temperatures, keys = given
    tokens, marks = [], []
    for row, temperature, key in zip(logits.tolist(), temperatures.tolist(), keys.tolist(), strict=True):
        scores = [
            -INF if x != x else x if temperature == 0 else _warm(x, temperature, key, i) for i, x in enumerate(row)
        ]
        tokens.append(scores.index(max(scores)))
    for bits in logits.contiguous().view(torch.int32).tolist():
        mark = sum(x * (2 * i + 1) for i, x in enumerate(bits)) * 0x9E3779B97F4A7C15 % 2**64
        marks.append(mark - 2**64 if mark >= 2**63 else mark)
    whole = [all(math.isfinite(x) for x in row) for row in logits.tolist()]
    made = (
        torch.tensor(one, dtype=dtype)
        for one, dtype in ((tokens, torch.int64), (marks, torch.int64), (whole, torch.bool))
    )
    return Sampled(*(one.to(logits.device) for one in made))


def _warm(logit: float, temperature: float, key: int, token: int) -> float:
    """SplitMix64 as its authors wrote it down, from the state that the key and the tokens before have left."""
    z = (key + (token + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    u = (((z ^ z >> 31) >> 12) + 0.5) / 2**52
    return logit / max(temperature, 1e-200) - math.log(-math.log(u))
