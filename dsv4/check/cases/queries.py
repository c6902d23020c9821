"""Queries of the indexer in bytes, and the weights of their heads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from dsv4.check.cases.compress_keys import numbers, sylvester
from dsv4.check.cases.inputs import BF16, INF, MANY, NAN, normal, padded
from dsv4.check.cases.quantize import search
from dsv4.check.cases.rope import turn, turned
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import EXACT, Bound, Bounds
from dsv4.ops.index_queries import IndexQueries, index_queries
from dsv4.quant import e2m1
from dsv4.quant.formats import FP8_ROW, MXFP4
from dsv4.quant.index_keys import DIMS, FP4_KEYS, FP8_KEYS, KEY_LAYOUTS, KeyLayout

HEADS = 64
# A sum in another order turns a rounding to BF16 now and then, and a code behind it, by several near zero in E4M3.
NEAR: Bounds = {"e2m1": Bound("ulp", 1, share=1e-3), "e4m3": Bound("ulp", 32, share=1e-3), "weights": EXACT}


def stored(given: Arguments, found: IndexQueries) -> dict[str, Any]:
    """Bytes as the numbers that they are, the heads of a token one after another."""
    data, scales, weights = found
    return {"queries": numbers(data.flatten(1), scales.flatten(1), given[3].name), "weights": weights}


def exact(given: Arguments, found: Any) -> dict[str, Any]:
    """Rotation and spread in FP64, each rounded; the nearest codes by search."""
    q, by, logits, layout, spread = given
    x = turned(q, by).flatten(0, 1)
    if spread:
        x = (x.double() @ sylvester(DIMS) * DIMS**-0.5).to(BF16)
    fmt, block = (MXFP4, 32) if layout == FP4_KEYS else (FP8_ROW, DIMS)
    codes, scales = (torch.from_numpy(part) for part in search(x, fmt, block, np.array(1, np.float32)))
    if layout == FP8_KEYS:  # the same powers of two, as FP32
        powers = torch.tensor([2.0 ** (n - 127) for n in range(255)] + [NAN])
        scales = powers[scales.long()].view(torch.uint8)
    data = e2m1.pack(codes) if layout == FP4_KEYS else codes
    weights = (logits.to(BF16).double() * np.float32((DIMS * q.shape[1]) ** -0.5)).to(BF16).float()
    data, scales = (part.view(len(q), q.shape[1] * part.shape[1]) for part in (data, scales))
    return {"queries": numbers(data, scales, layout.name), "weights": weights}


def cases() -> Iterator[Case]:
    case = partial(
        Case, op=index_queries, tokens=(0, 1, 2), bounds=NEAR, outcome=stored, oracle=exact, oracle_bounds=NEAR
    )  # fmt: skip
    for name, layout in KEY_LAYOUTS.items():
        for tokens, heads in ((1, 64), (3, 17), (5, 16), (0, 64), (2, 1)):
            for spread in (True, False):
                make = partial(_given, layout, spread, tokens, heads)
                yield case(name=f"{name} {tokens} x {heads}{'' if spread else ' plain'}", make=make)
        yield case(name=f"{name} rows apart", make=partial(_apart, layout))
        yield case(name=f"{name} odd heads", make=partial(_odd, layout))
        yield case(name=f"{name} fp32", make=partial(_wide, layout), refusable=True, oracle=None)
        for tokens in (1, 64, MANY):
            make = partial(_given, layout, True, tokens, HEADS)
            yield case(name=f"{name} flash {tokens}", make=make, size="big", bench=f"{name} flash", oracle=None)


def _given(layout: KeyLayout, spread: bool, tokens: int, heads: int) -> Arguments:
    q, logits = normal("q", tokens, heads, DIMS, dtype=BF16, size=2), normal("logits", tokens, heads)
    return q, turn(tokens), logits, layout, spread


def _apart(layout: KeyLayout) -> Arguments:
    """As parts of wider rows."""
    q, by, logits, *rest = _given(layout, True, 4, 16)
    return padded(q.flatten(1)).unflatten(1, (16, DIMS)), by, padded(logits), *rest


def _odd(layout: KeyLayout) -> Arguments:
    """Zeros, a NaN and an infinity, each with its head; numbers and weights of very different size."""
    q, by, logits, *rest = _given(layout, True, 3, 20)
    q[0, 0], q[0, 3, 5], q[1, 2, 100], q[2, 19] = 0.0, NAN, INF, q[2, 19] * 1e-30
    q[1, 7, :64] *= 1e4
    logits[0, :3] = torch.tensor([0.0, -3e38, 1e-40])
    return q, by, logits, *rest


def _wide(layout: KeyLayout) -> Arguments:
    q, *rest = _given(layout, True, 2, 16)
    return q.float(), *rest
