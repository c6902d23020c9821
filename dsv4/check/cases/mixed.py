"""A dense and a stored matrix that share an input."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from dsv4.check.cases import linear, matmul
from dsv4.check.cases.inputs import BF16, NAN, normal
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bounds
from dsv4.ops.linear import Products, shared_input
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import FP8_ROW

NEAR: Bounds = {"dense": matmul.NEAR["f32"], "stored": linear.NEAR["bf16"]}
# rows of the dense one (compressor; at ratio 4 the indexer's compressor and the weights of its heads too), of wq_a with
# wkv, and the columns of both
SHAPES = {
    "flash inputs of 4": (2624, 1536, 4096),
    "flash inputs of 128": (1024, 1536, 4096),
    "pro inputs of 4": (2624, 2048, 7168),
    "pro inputs of 128": (1024, 2048, 7168),
}


def cases() -> Iterator[Case]:
    case = partial(Case, op=shared_input, tokens=(0, 1), bounds=NEAR, oracle=_exact, oracle_bounds=NEAR)
    for tokens, dense, stored, columns in ((1, 20, 64, 128), (3, 100, 192, 256), (0, 9, 64, 128), (9, 40, 64, 384)):
        given = (tokens, dense, stored, columns)
        yield case(name=f"{tokens} x {dense} and {stored} x {columns}", make=partial(_given, *given))
    for given in ((8, 700, 320, 2048), (5, 2624, 1536, 4096), (12, 700, 1536, 4096)):
        tokens, dense, stored, columns = given
        yield case(name=f"{tokens} x {dense} and {stored} x {columns}", make=partial(_given, *given), size="full")
    yield case(name="odd rows", make=_odd)
    for label, (dense, stored, columns) in SHAPES.items():
        for tokens in (1, 8):
            make = partial(_given, tokens, dense, stored, columns)
            yield case(name=f"{label} {tokens}", make=make, size="big", bench=label)


def _exact(given: Arguments, found: Any) -> Products:
    x, rows, dense, stored = given
    return Products(matmul.exact((x, dense), None), linear.exact((rows, stored, x.dtype), None))


def _given(tokens: int, dense: int, stored: int, columns: int) -> Arguments:
    x = normal("x", tokens, columns, dtype=BF16)
    return x, quantize.reference(x, FP8_ROW), matmul.weights(dense, columns, BF16), linear.matrix(stored, columns)


def _odd() -> Arguments:
    """Zeros, a NaN, ordinary rows."""
    x, _, dense, stored = _given(5, 90, 128, 512)
    x[0], x[2, 100] = 0.0, NAN
    return x, quantize.reference(x, FP8_ROW), dense, stored
