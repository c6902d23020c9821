"""Query heads straight from their matrix, against the product in FP64 with norm and rotation behind it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases import linear, rope
from dsv4.check.cases.inputs import BF16, FP32
from dsv4.check.cases.norm import EPS
from dsv4.check.contract import Arguments, Case, Size
from dsv4.check.metrics import Bounds
from dsv4.ops.linear_heads import scaled_matmul_q_norm_rope
from dsv4.ops.norm import unit_rms

NEAR: Bounds = linear.NEAR  # a head's factor is that of the mean of its own products
HEAD = 512
# heads and columns of wq_b: what decode reads at TP1, and what a rank has of it
SHAPES = {"flash wq_b to heads": (64, 1024), "pro wq_b to heads": (128, 1536)}
SLICES = {f"{label} of {n}": (h // n, c) for label, (h, c) in SHAPES.items() for n in linear.RANKS}
# Tokens for every kernel, one less and one more; clusters of eight, four and two blocks, and single ones.
SMALL = ((1, 1, 128), (3, 2, 384), (0, 4, 128), (8, 4, 256), (9, 3, 128))
FULL = (
    (7, 17, 256),
    (16, 4, 128),
    (17, 8, 384),
    (32, 2, 1536),
    (33, 4, 128),
    (1, 64, 128),
    (2, 128, 128),
    (3, 133, 128),
)


def cases() -> Iterator[Case]:
    case = partial(
        Case, op=scaled_matmul_q_norm_rope, tokens=(0, 4), bounds=NEAR, oracle=_exact, oracle_bounds=NEAR
    )  # fmt: skip
    for name, dtype in (("fp32", FP32), ("bf16", BF16)):
        sizes: tuple[tuple[Size, tuple[tuple[int, int, int], ...]], ...] = (("small", SMALL), ("full", FULL))
        for size, shapes in sizes:
            for tokens, heads, columns in shapes:
                make = partial(_given, tokens, heads, columns, dtype)
                yield case(name=f"{tokens} x {heads} heads x {columns} {name}", make=make, size=size)
        yield case(name=f"many tokens {name}", make=partial(_given, 300, 8, 1024, dtype), size="big")
        yield case(name=f"all dimensions turn {name}", make=partial(_given, 2, 2, 128, dtype, HEAD))
        yield case(name=f"odd rows {name}", make=partial(_odd, dtype))
    yield case(name="heads of 256", make=partial(_given, 3, 2, 128, BF16, 64, 256), refusable=True)
    yield case(name="two segments", make=partial(_given, 3, 2, 2048, BF16), refusable=True)
    yield case(name="few dimensions turn", make=partial(_given, 3, 2, 128, BF16, 12), refusable=True)
    for label, (heads, columns) in SHAPES.items():
        for tokens in (1, 2, 8, 16, 32):
            make = partial(_given, tokens, heads, columns, BF16)
            yield case(name=f"{label} {tokens}", make=make, size="big", bench=label)
    for label, (heads, columns) in SLICES.items():
        for tokens in (1, 16):
            make = partial(_given, tokens, heads, columns, BF16)
            yield case(name=f"{label} {tokens}", make=make, size="timed", bench=label)


def _given(
    tokens: int, heads: int, columns: int, dtype: torch.dtype, turned: int = rope.ROTATED, head: int = HEAD
) -> Arguments:
    x, weight = linear.rows_of(tokens, columns), linear.matrix(heads * head, columns)
    return x, weight, heads, EPS, rope.turn(tokens, turned), dtype


def _odd(dtype: torch.dtype) -> Arguments:
    """Zeros, a NaN and an infinity, each with its row; blocks of very different size; ordinary rows."""
    x, _, _ = linear._odd(5, dtype)
    return x, linear.matrix(2 * HEAD, 512), 2, EPS, rope.turn(5), dtype


def _exact(given: Arguments, found: Any) -> Tensor:
    x, weight, heads, eps, by, dtype = given
    return rope.turned(unit_rms(linear.exact((x, weight, dtype), None).unflatten(1, (heads, -1)), eps), by)
