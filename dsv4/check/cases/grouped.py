"""The first half of the output projection: groups of columns, each with a matrix of its own, in BF16, FP8 and mixed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, FP32, INF, NAN, normal
from dsv4.check.cases.linear import MANY, NEAR, RANKS, matrix, rows_of
from dsv4.check.cases.matmul import weights
from dsv4.check.cases.quantize import searched
from dsv4.check.contract import Arguments, Case, Size
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.linear import dense, grouped_linear, grouped_scaled_matmul
from dsv4.ops.linear_grouped import grouped_linear_quant
from dsv4.quant.formats import FP8_ROW
from dsv4.quant.tensor import QTensor

BF16_NEAR: Bounds = {"bf16": Bound("rms", 2.5e-3)}  # one rounding; before it a sum of FP32
# A number that is rounded the other way moves a code now and then, and the scale of a block whose largest it is.
CODES: Bounds = {"data": Bound("rms", 2.0**-5)}
# rows, columns and groups of wo_a; a rank has whole groups of it
SHAPES = {"flash wo_a": (8192, 4096, 8), "pro wo_a": (16384, 4096, 16)}
SLICES = {f"{label} of {n}": (r // n, c, g // n) for label, (r, c, g) in SHAPES.items() for n in RANKS}
SMALL = ((1, 256, 128, 2), (5, 768, 256, 3), (0, 256, 128, 2), (9, 256, 640, 1), (17, 384, 384, 3))
# Segments, tiles and chains of every length; tokens for every form of the kernels, and more than one turn.
LARGE = (
    (3, 1024, 2304, 4),
    (20, 2048, 4096, 8),
    (40, 1024, 1024, 8),
    (65, 512, 640, 2),
    (130, 768, 2048, 3),
    (300, 512, 4096, 2),
)


def exact(given: Arguments, found: Any) -> Tensor:
    """In FP64, rounded once. x: [T, G, K], or [T, G * K] stored."""
    x, weight, *_ = given
    parts = x.values().unflatten(1, (-1, weight.shape[1])) if isinstance(x, QTensor) else x
    blocks = dense(weight).double().unflatten(0, (parts.shape[1], -1))
    return torch.einsum("tgk,grk->tgr", parts.double(), blocks).flatten(1).to(found.dtype)


def cases() -> Iterator[Case]:
    yield from _bf16()
    yield from _fp8()
    yield from _quantised()


def _bf16() -> Iterator[Case]:
    case = partial(
        Case, op=grouped_linear, tokens=(0,), bounds=BF16_NEAR, oracle=exact, oracle_bounds=BF16_NEAR
    )  # fmt: skip
    # The smaller op reads widened weights, of which 256 columns are a chain of products; of E4M3 128 are.
    stored_case = partial(case, unfused_bounds=BF16_NEAR)
    for stored in (True, False):
        kind = "fp8" if stored else "bf16"
        for sizes, shapes in (("small", SMALL), ("full", LARGE)):
            for shape in shapes:
                size: Size = "small" if sizes == "small" else "full"
                yield (stored_case if stored else case)(
                    name=f"{_named(*shape)} {kind}", make=partial(_wide, *shape, stored), size=size
                )
    yield stored_case(name="odd rows, odd codes", make=_odd)
    yield stored_case(name="groups of half a tile", make=partial(_wide, 2, 192, 128, 3, True), refusable=True)
    for label, (rows, columns, groups), tokens, size, flops in _timed():
        make = partial(_wide, tokens, rows, columns, groups, True)
        yield stored_case(name=f"{label} {tokens}", make=make, size=size, bench=label, flops=flops)


def _fp8() -> Iterator[Case]:
    case = partial(
        Case, op=grouped_scaled_matmul, tokens=(0,), bounds=NEAR, oracle=exact, oracle_bounds=NEAR
    )  # fmt: skip
    for name, dtype in (("fp32", FP32), ("bf16", BF16)):
        for sizes, shapes in (("small", SMALL), ("full", LARGE)):
            for shape in shapes:
                size: Size = "small" if sizes == "small" else "full"
                yield case(name=f"{_named(*shape)} {name}", make=partial(given, *shape, dtype), size=size)
    yield case(name="groups of half a tile", make=partial(given, 2, 192, 128, 3, BF16), refusable=True)
    for label, (rows, columns, groups), tokens, size, flops in _timed():
        make = partial(given, tokens, rows, columns, groups, BF16)
        yield case(name=f"{label} {tokens}", make=make, size=size, bench=label, flops=flops)


def _quantised() -> Iterator[Case]:
    """BF16 in, bytes out: judged by their values, as a number that is rounded the other way may move a scale."""
    case = partial(Case, op=grouped_linear_quant, tokens=(0,), bounds=CODES, outcome=_decoded, wanted=_stored_rows)
    for stored in (True, False):
        kind = "fp8" if stored else "bf16"
        for shape in SMALL + LARGE:
            size: Size = "small" if shape in SMALL else "full"
            yield case(name=f"{_named(*shape)} {kind}", make=partial(_rows, *shape, stored), size=size)
    yield case(name="odd rows, odd codes", make=lambda: (*_odd(), FP8_ROW))
    yield case(name="groups of half a tile", make=partial(_rows, 2, 192, 128, 3, True), refusable=True)
    for label, (rows, columns, groups), tokens, size, flops in _timed():
        make = partial(_rows, tokens, rows, columns, groups, True)
        yield case(name=f"{label} {tokens}", make=make, size=size, bench=f"{label} to bytes", flops=flops)


def _rows(tokens: int, rows: int, columns: int, groups: int, stored: bool) -> Arguments:
    return *_wide(tokens, rows, columns, groups, stored), FP8_ROW


def _decoded(given: Arguments, found: Any) -> dict[str, Tensor]:
    """Values, and which blocks are stored as NaN."""
    return {"data": found.values().float(), "nan": found.scale.view(torch.uint8) == 255}


def _stored_rows(given: Arguments, found: Any) -> dict[str, Tensor]:
    x, weight, fmt = given
    return _decoded(given, searched(grouped_linear.reference(x, weight).cpu(), fmt))


def _timed() -> Iterator[tuple[str, tuple[int, int, int], int, Size, int]]:
    """Label, rows, columns and groups, tokens, size of the case, operations (0 where bytes alone count)."""
    for label, shape in SHAPES.items():
        for tokens in (1, 16, *MANY):
            yield label, shape, tokens, "big" if tokens < MANY[0] else "timed", 2 * tokens * shape[0] * shape[1]
    for label, shape in SLICES.items():
        for tokens in (1, 16):
            yield label, shape, tokens, "timed", 0


def _named(tokens: int, rows: int, columns: int, groups: int) -> str:
    return f"{tokens} x {groups} of {rows // groups} x {columns}"


def given(tokens: int, rows: int, columns: int, groups: int, dtype: torch.dtype) -> Arguments:
    return rows_of(tokens, groups * columns), matrix(rows, columns), groups, dtype


def _wide(tokens: int, rows: int, columns: int, groups: int, stored: bool) -> Arguments:
    x = normal("x", tokens, groups * columns, dtype=BF16).unflatten(1, (groups, columns))
    return x, matrix(rows, columns) if stored else weights(rows, columns, BF16)


def _odd() -> Arguments:
    """Zeros, a NaN and an infinity, each with its row; every code; a NaN among the weights, with its row."""
    x, weight = _wide(5, 512, 256, 2, True)
    x[0], x[2, 1, 100], x[3, 0, 30] = 0.0, NAN, INF
    codes = weight.data.view(torch.uint8)
    codes[7], codes[300, 5], codes[301, 250] = torch.arange(256, dtype=torch.uint8), 127, 255
    codes[7, [127, 255]] = 0
    return x, weight
