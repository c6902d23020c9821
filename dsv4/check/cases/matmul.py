"""Products with dense matrices, against operands in FP64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, FP32, INF, MANY, NAN, normal, padded
from dsv4.check.contract import Arguments, Case, Size
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.linear import matmul

NEAR: Bounds = {"f32": Bound("rms", 1e-5)}
# rows and columns: what shares the input of a ratio-4 layer (compressor, the indexer's, index weights) and of a
# ratio-128 layer, and the router
SHAPES = {
    "flash inputs of 4": (2624, 4096),
    "flash inputs of 128": (1024, 4096),
    "flash router": (256, 4096),
    "pro inputs of 4": (2624, 7168),
    "pro inputs of 128": (1024, 7168),
    "pro router": (384, 7168),
}
PAIRS = (("fp32", FP32, FP32), ("bf16 x fp32", BF16, FP32), ("fp32 x bf16", FP32, BF16), ("bf16", BF16, BF16))


def exact(given: Arguments, found: Any) -> Tensor:
    """In FP64, rounded once."""
    x, weight = given
    y: Tensor = x.double() @ weight.double().T
    return y.float()


def cases() -> Iterator[Case]:
    case = partial(Case, op=matmul, tokens=(0,), bounds=NEAR, oracle=exact, oracle_bounds=NEAR)
    for name, x, w in PAIRS:
        for tokens, rows, columns in ((1, 9, 40), (3, 8, 301), (0, 5, 16), (6, 17, 7), (5, 3, 524)):
            # Tensor cores, which no threads can play, take pairs of BF16 with widths that are multiples of 8.
            size: Size = "big" if columns % 8 == 0 and x is w is BF16 else "small"
            make = partial(_given, tokens, rows, columns, x, w)
            # Where rows are not aligned, a CPU's library looks at addresses.
            alone = (0,) if columns % 4 == 0 else ()
            yield case(name=f"{tokens} x {rows} x {columns} {name}", make=make, size=size, tokens=alone)
        yield case(name=f"padded rows {name}", make=partial(_padded, x, w, 300))
        yield case(name=f"odd rows {name}", make=partial(_odd, x, w, 300))
        yield case(name=f"long rows {name}", make=partial(_given, 9, 12, 4100, x, w), size="full")
    # Every form of the tensor cores, slices and boxes cut short, tiles of rows and tokens too.
    for tokens, rows, columns in (
        (1, 64, 128), (2, 20, 136), (7, 100, 264), (8, 2624, 4096), (9, 300, 1024), (16, 5000, 520), (17, 5000, 136),
        (33, 5000, 1032), (40, 256, 7168), (65, 4500, 776), (130, 700, 4096), (300, 1000, 1000), (257, 64, 64),
    ):  # fmt: skip
        make = partial(_given, tokens, rows, columns, BF16, BF16)
        yield case(name=f"{tokens} x {rows} x {columns} bf16", make=make, size="big")
    yield case(name="padded rows of boxes bf16", make=partial(_padded, BF16, BF16, 304), size="big")
    for tokens in (5, 70):
        make = partial(_odd, BF16, BF16, 1032, tokens)
        yield case(name=f"odd rows of boxes {tokens} bf16", make=make, size="big")
    for label, (rows, columns) in SHAPES.items():
        for tokens in (1, 16, MANY):
            make = partial(_given, tokens, rows, columns, BF16, BF16)
            yield case(name=f"{label} {tokens}", make=make, size="big", bench=label)


def _given(tokens: int, rows: int, columns: int, x: torch.dtype, w: torch.dtype) -> Arguments:
    return normal("x", tokens, columns, dtype=x), weights(rows, columns, w)


def weights(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """About as large as those of a release."""
    return normal("weight", rows, columns, dtype=dtype, size=0.02)


def _padded(x: torch.dtype, w: torch.dtype, columns: int) -> Arguments:
    given, weight = _given(3, 24, columns, x, w)
    return padded(given), weight


def _odd(x: torch.dtype, w: torch.dtype, columns: int, tokens: int = 5) -> Arguments:
    """Zeros, a NaN and an infinity, each with its row; numbers of very different size; an ordinary row and on."""
    given, weight = _given(tokens, 90, columns, x, w)
    given[0], given[2, 100], given[3, 290] = 0.0, NAN, INF
    given[1] *= 10.0 ** (torch.arange(columns) // 64 % 5 * 3 - 8).to(x)
    return given, weight
