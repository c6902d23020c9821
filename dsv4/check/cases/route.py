"""Routing. Operands are small whole numbers, whose products are exact, so that equal scores are equal everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.head import largest
from dsv4.check.cases.inputs import BF16, FP32, INF, MANY, NAN, normal
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.moe import Route, route

NEAR: Bounds = {"f32": Bound("ulp", 8)}
EXPERTS = {"flash": (256, 4096, 1.5), "pro": (384, 7168, 2.5)}  # their number, the width, the scale of their weights


def cases() -> Iterator[Case]:
    case = partial(
        Case, op=route, tokens=(0,), bounds=NEAR, unfused_bounds=NEAR, oracle=_exact, oracle_bounds=NEAR
    )  # fmt: skip
    for tokens, experts, columns, k in ((1, 40, 8, 2), (5, 256, 12, 6), (0, 64, 8, 1), (3, 384, 8, 6), (2, 500, 4, 16),
                                        (6, 3, 4, 3)):  # fmt: skip
        given = (tokens, experts, columns, k, FP32)
        name = f"{k} of {experts}, {tokens} tokens"
        yield case(name=name, make=partial(_scored, *given))
        yield case(name=f"{name}, given", make=partial(_hashed, *given), tokens=(0, 3))
        yield case(name=f"{name}, no bias", make=partial(_scored, *given, biased=False))
    yield case(name="odd scores", make=partial(_odd, 300, FP32))
    for tokens, experts, columns, k in ((1, 256, 264, 6), (2, 40, 72, 2), (8, 250, 1032, 6), (5, 8, 16, 8)):
        given = (tokens, experts, columns, k, BF16)
        name = f"{k} of {experts}, {tokens} tokens of BF16"
        yield case(name=name, make=partial(_scored, *given), size="big")
        yield case(name=f"{name}, given", make=partial(_hashed, *given), size="big", tokens=(0, 3))
    yield case(name="odd scores of BF16", make=partial(_odd, 250, BF16), size="big")
    for label, (experts, columns, scale) in EXPERTS.items():
        for tokens in (1, 4, 8, 16, MANY):
            make = partial(_scored, tokens, experts, columns, 6, BF16, scale)
            yield case(name=f"{label} {tokens}", make=make, size="big", bench=label)
        make = partial(_hashed, 3, experts, columns, 6, BF16, scale)
        yield case(name=f"{label} 3, given", make=make, size="big", tokens=(0, 3))


def _exact(given: Arguments, found: Any) -> Route:
    """Scores in FP64, rounded once, and the largest sums."""
    x, gate, bias, chosen, k, scale = given
    logits = x.double() @ gate.double().T
    scores = torch.logaddexp(logits, torch.zeros_like(logits)).sqrt().float()
    if chosen is None:
        chosen = largest(scores if bias is None else scores + bias, k)
    weights = scores.double().gather(1, chosen)
    return Route(chosen, (weights / weights.sum(1, keepdim=True) * scale).float())


def _operands(tokens: int, experts: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of a few units, in steps that make many of them equal."""
    x, gate = (normal(name, n, columns).round() for name, n in (("x", tokens), ("gate", experts)))
    return x.to(dtype), (gate * 2.0 ** -(columns.bit_length() // 2)).to(dtype)


def _scored(
    tokens: int, experts: int, columns: int, k: int, dtype: torch.dtype, scale: float = 1.5, biased: bool = True
) -> Arguments:
    bias = (normal("bias", experts) * 4).round() / 4 if biased else None
    return *_operands(tokens, experts, columns, dtype), bias, None, k, scale


def _hashed(tokens: int, experts: int, columns: int, k: int, dtype: torch.dtype, scale: float = 1.5) -> Arguments:
    chosen = normal("chosen", tokens, experts).argsort(1)[:, :k].contiguous()
    return *_operands(tokens, experts, columns, dtype), None, chosen, k, scale


def _odd(experts: int, dtype: torch.dtype) -> Arguments:
    """All scores equal; NaN alone; one NaN and one infinity; logits above 20, and far below; an ordinary token."""
    x, gate, bias, _, k, scale = _scored(6, experts, 8, 6, dtype)
    x[:, :2] = 0
    gate[:, 0], gate[:, 1] = 0, 0
    gate[7, 0], gate[9, 1], gate[40, 1] = NAN, INF, -INF
    x[0] = 0
    x[1] = NAN
    x[3] *= 1000
    x[4] = -3 * gate.new_tensor([0, 0, 1, 1, 1, 1, 1, 1])
    return x, gate, bias, None, k, scale
