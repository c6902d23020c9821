"""Products with stored matrices, against the operands decoded to FP64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, FP32, INF, NAN, normal
from dsv4.check.contract import Arguments, Case, Size
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.linear import linear, scaled_matmul
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import FP8_BLOCK, FP8_ROW, NVFP4
from dsv4.quant.rounding import FP8
from dsv4.quant.tensor import QTensor

# The tensor cores of Hopper add E4M3 products in about 14 bits; a sum of FP32 rounds to BF16 twice as far off.
NEAR: Bounds = {"f32": Bound("rms", 1e-3), "bf16": Bound("rms", 2.5e-3)}
# rows and columns by the names of the release: what decode reads at TP1
SHAPES = {
    "flash wq_b": (32768, 1024),
    "flash wo_b": (4096, 8192),
    "flash shared w1 w3": (4096, 4096),
    "flash shared w2": (4096, 2048),
    "flash wq_a wkv": (1536, 4096),
    "flash index wq_b": (8192, 1024),
    "pro wq_b": (65536, 1536),
    "pro wo_b": (7168, 16384),
    "pro shared w1 w3": (6144, 7168),
    "pro shared w2": (7168, 3072),
    "pro wq_a wkv": (2048, 7168),
}
RANKS = (2, 4, 8)  # GPUs that share a matrix: out of its rows, or out of its columns
SLICES = {
    f"{label} of {n}": (rows, columns // n) if label.endswith(("wo_b", "w2")) else (rows // n, columns)
    for label, (rows, columns) in SHAPES.items()
    if not label.endswith("wkv")  # which every rank reads whole
    for n in RANKS
}
MANY = (64, 128, 512, 4096, 8192)  # tokens of a chunk, timed


def exact(given: Arguments, found: Any) -> Tensor:
    """In FP64, rounded once."""
    x, weight, dtype = given
    y: Tensor = x.values().double() @ weight.values().double().T
    return y.to(dtype)


def cases() -> Iterator[Case]:
    yield from _product()
    yield from _nvfp4()
    yield from _slices()
    yield from _whole_layer()


def _product() -> Iterator[Case]:
    case = partial(Case, op=scaled_matmul, tokens=(0,), bounds=NEAR, oracle=exact, oracle_bounds=NEAR)
    for name, dtype in (("fp32", FP32), ("bf16", BF16)):
        for tokens, rows, columns in ((1, 64, 128), (3, 128, 256), (8, 192, 1024), (0, 128, 128)):
            yield case(name=f"{tokens} x {rows} x {columns} {name}", make=partial(_given, tokens, rows, columns, dtype))
        # Segments of unlike lengths, several tiles a cluster, tokens for every kernel and for more than one turn.
        for tokens, rows, columns in (
            (2, 192, 2304),
            (9, 320, 2048),
            (17, 256, 4096),
            (31, 192, 1024),
            (40, 192, 8192),
            (64, 320, 1024),
            (100, 64, 2048),
            (128, 448, 4096),
            (129, 192, 2304),
            (130, 128, 1024),
            (300, 320, 1536),
            (1024, 192, 2048),
        ):
            make = partial(_given, tokens, rows, columns, dtype)
            yield case(name=f"{tokens} x {rows} x {columns} {name}", make=make, size="full")
        # More tiles than multiprocessors: of 128 and 256 tokens, some of them in part or wholly beyond the edge.
        for tokens, rows, columns in ((600, 2112, 2304), (1100, 1088, 4096), (300, 8512, 1024), (1024, 8448, 1024)):
            make = partial(_given, tokens, rows, columns, dtype)
            yield case(name=f"{tokens} x {rows} x {columns} {name}", make=make, size="big")
        for tokens in (5, 70):
            yield case(name=f"odd rows of {tokens} {name}", make=partial(_odd, tokens, dtype))
    for tokens, rows, columns in ((3, 96, 128), (3, 128, 192)):
        make = partial(_given, tokens, rows, columns, BF16)
        yield case(name=f"{tokens} x {rows} x {columns}", make=make, refusable=True)
    for label, (rows, columns) in SHAPES.items():
        for tokens in (1, 16, *MANY):
            make = partial(_given, tokens, rows, columns, BF16)
            size: Size = "big" if tokens < MANY[0] else "timed"
            flops = 2 * tokens * rows * columns
            yield case(name=f"{label} {tokens}", make=make, size=size, bench=label, flops=flops)


def _nvfp4() -> Iterator[Case]:
    """Both operands of it, which no kernel of ours takes and a library may."""
    case = partial(Case, op=scaled_matmul, tokens=(0,), bounds=NEAR, oracle=exact, oracle_bounds=NEAR, refusable=True)
    for name, dtype in (("fp32", FP32), ("bf16", BF16)):
        for tokens, rows, columns in ((1, 16, 32), (3, 144, 96), (130, 48, 256)):
            make = partial(_given_nvfp4, tokens, rows, columns, dtype)
            yield case(name=f"nvfp4 {tokens} x {rows} x {columns} {name}", make=make)


def _slices() -> Iterator[Case]:
    case = partial(Case, op=scaled_matmul, tokens=(0,), bounds=NEAR, size="timed")
    for label, (rows, columns) in SLICES.items():
        for tokens in (1, 16):
            make = partial(_given, tokens, rows, columns, BF16)
            yield case(name=f"{label} {tokens}", make=make, bench=label)


def _whole_layer() -> Iterator[Case]:
    """The quantiser in front of the product."""
    case = partial(
        Case, op=linear, tokens=(0,), bounds=NEAR, unfused_bounds=NEAR, oracle=_exact_layer, oracle_bounds=NEAR
    )  # fmt: skip
    for name, dtype in (("fp32", FP32), ("bf16", BF16)):
        for tokens, rows, columns in ((1, 64, 128), (3, 128, 384), (0, 128, 128), (40, 192, 1024)):
            make = partial(_layer, tokens, rows, columns, dtype)
            yield case(name=f"whole, {tokens} x {rows} x {columns} {name}", make=make)
    for label in ("flash wo_b", "pro wo_b"):
        for tokens in (1, 16, MANY[-1]):
            make = partial(_layer, tokens, *SHAPES[label], BF16)
            yield case(name=f"whole, {label} {tokens}", make=make, size="timed", bench=f"{label}, quantised before")


def _layer(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> Arguments:
    return normal("x", tokens, columns, dtype=dtype), matrix(rows, columns), FP8


def _exact_layer(given: Arguments, found: Any) -> Tensor:
    x, weight, _ = given
    return exact((quantize.reference(x, FP8_ROW), weight, x.dtype), found)


def _given(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> Arguments:
    return rows_of(tokens, columns), matrix(rows, columns), dtype


def _given_nvfp4(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> Arguments:
    """Each token under a global scale of its own, the matrix under one."""
    x = quantize.reference(normal("x", tokens, columns, dtype=BF16), NVFP4, "row")
    return x, NVFP4.encode(normal("nvfp4", rows, columns, size=0.02)), dtype


def rows_of(tokens: int, columns: int) -> QTensor:
    """Activations as they are stored."""
    return quantize.reference(normal("x", tokens, columns, dtype=BF16), FP8_ROW)


def matrix(rows: int, columns: int) -> QTensor:
    """Every code but NaN, as often as another, under scales of about a thousandth that differ by up to a hundred."""
    draw = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, 254, (rows, columns), generator=draw, dtype=torch.uint8)
    codes = torch.where(codes >= 127, codes + 1, codes)  # 127 and 255 are NaN
    scale = torch.randint(114, 121, FP8_BLOCK.scale_shape(rows, columns), generator=draw, dtype=torch.uint8)
    return QTensor(codes.view(torch.float8_e4m3fn), scale, FP8_BLOCK)


def _odd(tokens: int, dtype: torch.dtype) -> Arguments:
    """Zeros, a NaN and an infinity, each with its row; blocks of very different size; ordinary rows."""
    x = normal("x", tokens, 512, dtype=BF16)
    x[0], x[2, 100], x[3, 300], x[-2, 500] = 0.0, NAN, INF, -INF
    x[1] *= 10.0 ** (torch.arange(512) // 128 * 3 - 5).to(BF16)
    return quantize.reference(x, FP8_ROW), matrix(128, 512), dtype
