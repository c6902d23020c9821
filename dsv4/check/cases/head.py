"""Logits and the best of them. Small whole numbers, whose sums are exact: many logits are equal."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, FP32, INF, NAN, normal
from dsv4.check.contract import Arguments, Case
from dsv4.ops.sample import Choice, head

VOCABULARY = 129_280
PART = 2048  # logits that a block of the kernel looks at together


def cases() -> Iterator[Case]:
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
