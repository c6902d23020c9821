"""Rows of keys and values, written into pages as bytes and read back. Their layout is spelt out here once more."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, BIG, FP32, INF, MANY, NAN, norm_weight, normal
from dsv4.check.cases.norm import DTYPES, EPS, exact_norm, size_of
from dsv4.check.cases.quantize import search
from dsv4.check.cases.rope import turn, turned
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.kv import read_kv, write_kv
from dsv4.quant.formats import FP8_ROW

# A norm whose sum has another order turns a rounding now and then, and with it a code behind it.
CODES: Bounds = {"e4m3": Bound("ulp", 1, share=0.002), "bf16": Bound("ulp", 2, share=0.01, floor=2.0**-22)}
PAGE = 64  # tokens
SHAPE = (512, 64)  # width of a head, and how much of it is rotated


def page_bytes(tokens: int, dims: int, rotated: int) -> int:
    """Of a page: rows and scales, up to a multiple of a row."""
    row = dims + rotated
    return -(-tokens * (row + _scale_bytes(dims, rotated)) // row) * row


def _scale_bytes(dims: int, rotated: int) -> int:
    return -(-(dims - rotated) // 512) * 8  # one for 64 numbers, eight at a time


def pattern(pages: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """What pages hold before they are written: bytes that no step of a power of two repeats."""
    count = pages * size
    return torch.arange(251, dtype=torch.uint8, device=device).repeat(count // 251 + 1)[:count].view(pages, size)


def stored(given: Arguments, found: Any) -> dict[str, Tensor]:
    """What lies in the pages at the written rows, and how many bytes elsewhere are no longer what they were."""
    kv, _, _, by, pages, rows = given
    written = places(rows[rows >= 0], pages, kv.shape[1], by.cos.shape[1])
    data, scales = (pages.flatten()[at] for at in written)
    before = pattern(pages.shape[0], pages.shape[1], pages.device)
    for at in written:
        before.view(-1)[at] = pages.view(-1)[at]
    straight = kv.shape[1] - by.cos.shape[1]
    return {
        "numbers": data[:, :straight].contiguous().view(torch.float8_e4m3fn),
        "turned": data[:, straight:].contiguous().view(BF16),
        "scales": scales,
        "elsewhere": (before != pages).sum(),
    }


def _tokens(size: int, dims: int, rotated: int) -> int:
    return size // (dims + rotated + _scale_bytes(dims, rotated))


def places(rows: Tensor, pages: Tensor, dims: int, rotated: int) -> tuple[Tensor, Tensor]:
    """Every byte of the rows and of their scales, counted from the first page's first: [T, bytes]."""
    row, scale, tokens = dims + rotated, _scale_bytes(dims, rotated), _tokens(pages.shape[1], dims, rotated)
    start, slot = rows // tokens * pages.shape[1], rows % tokens
    first = (start + slot * row, start + tokens * row + slot * scale)
    spans = (torch.arange(size, device=rows.device) for size in (row, scale))
    data, scales = (at.unsqueeze(1) + span for at, span in zip(first, spans, strict=True))
    return data, scales


def exact_rows(given: Arguments, found: Any) -> dict[str, Tensor]:
    """Norm and rotation in FP64, each rounded; then the nearest codes by search."""
    kv, weight, eps, by, _, rows = given
    x = turned(exact_norm(kv, weight, eps), by)[rows >= 0]
    straight = kv.shape[1] - by.cos.shape[1]
    codes, scales = search(x[:, :straight], FP8_ROW, 64, np.array(1, np.float32))
    padded = np.zeros((len(x), _scale_bytes(kv.shape[1], by.cos.shape[1])), np.uint8)
    padded[:, : scales.shape[1]] = scales
    return {
        "numbers": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        "turned": x[:, straight:].to(BF16),
        "scales": torch.from_numpy(padded),
        "elsewhere": torch.tensor(0),
    }


def cases() -> Iterator[Case]:
    yield from _write()
    yield from _read()


def _write() -> Iterator[Case]:
    judged = partial(Case, op=write_kv, writes=(4,), outcome=stored, moved=_written_bytes)
    case = partial(judged, bounds=CODES, oracle=exact_rows, oracle_bounds=CODES)
    alone = (0, 3, 5)
    for name, dtype in DTYPES.items():
        for label, rows, shape, page in (
            ("one token", [70], SHAPE, PAGE),
            ("ends of pages", [0, 63, 64, 127, 191], SHAPE, PAGE),
            ("any order", [130, 2, 67, 66, 1, 0, 190], SHAPE, PAGE),
            ("no token", [], SHAPE, PAGE),
            ("pages of one row", [2, 0], SHAPE, 1),
            ("pages of three rows", [8, 1, 3], SHAPE, 3),
        ):
            make = partial(_given, rows, dtype, shape, page)
            yield case(name=f"{label} {name}", make=make, tokens=alone, size=size_of(len(rows), 1024))
        make = partial(_given, [5, -1, 64, -1], dtype, SHAPE, PAGE)
        yield case(name=f"some not stored {name}", make=make)
        yield case(name=f"odd rows {name}", make=partial(_odd, dtype), tokens=alone, size="full")
        for dims, rotated in ((128, 64), (200, 64), (96, 32), (640, 64)):
            make = partial(_given, [0, 9, 17], dtype, (dims, rotated), PAGE)
            yield case(name=f"{dims} wide, {rotated} rotated {name}", make=make, tokens=alone, refusable=True)
    for tokens in (1, MANY):
        make = partial(_spread, tokens)
        size = size_of(tokens, 512)
        oracle = None if size == "big" else exact_rows
        yield case(name=f"flash {tokens}", make=make, tokens=alone, size=size, bench="flash", oracle=oracle)
    yield case(name=f"{BIG} tokens", make=partial(_spread, BIG), tokens=alone, size="big", oracle=None)
    yield case(name="past 2 GiB", make=_far, size="big", oracle=None)


def _written_bytes(given: Arguments, found: Any) -> int:
    kv, weight, _, by, _, rows = given
    row = kv.shape[1] + by.cos.shape[1] + _scale_bytes(kv.shape[1], by.cos.shape[1])
    return int(kv.nbytes + weight.nbytes + by.cos.nbytes + by.sin.nbytes + rows.nbytes + len(rows) * row)


def _read_bytes(given: Arguments, found: Any) -> int:
    _, rows, dims, rotated = given
    return int(len(rows) * (dims + rotated + _scale_bytes(dims, rotated)) + rows.nbytes + found.nbytes)


def _given(rows: list[int], dtype: torch.dtype, shape: tuple[int, int], page: int) -> Arguments:
    dims, rotated = shape
    pages = pattern(-(-192 // page), page_bytes(page, dims, rotated))
    return _with(normal("kv", len(rows), dims, dtype=dtype, size=3), rotated, pages, torch.tensor(rows).long())


def _with(kv: Tensor, rotated: int, pages: Tensor, rows: Tensor) -> Arguments:
    return kv, norm_weight(kv.shape[1]), EPS, turn(len(kv), rotated), pages, rows


def _odd(dtype: torch.dtype) -> Arguments:
    """Zeros; blocks of very different size; a NaN and an infinity, each with its row; an ordinary row."""
    kv = normal("kv", 5, 512, dtype=dtype)
    kv[0], kv[2, 100], kv[3, 500] = 0.0, NAN, INF
    kv[1] *= 10.0 ** (torch.arange(512) // 64 % 7 - 5).to(dtype)
    return _with(kv, 64, pattern(2, page_bytes(PAGE, *SHAPE)), torch.tensor([3, 4, 5, 64, 65]))


def _spread(tokens: int) -> Arguments:
    """Rows all over pages that hold four times as many."""
    pages = -(-4 * tokens // PAGE)
    rows = torch.arange(tokens) * 4 * 4095 % (pages * PAGE)
    return _with(normal("kv", tokens, 512, dtype=BF16), 64, pattern(pages, page_bytes(PAGE, *SHAPE)), rows)


def _far() -> Arguments:
    """The last pages lie more than 2^31 bytes behind the first."""
    size = page_bytes(PAGE, *SHAPE)
    pages = 2**31 // size + 2
    rows = torch.tensor([0, pages * PAGE - 1, pages * PAGE - PAGE, pages * PAGE // 2])
    return _with(normal("kv", 4, 512, dtype=BF16), 64, pattern(pages, size), rows)


def decoded(given: Arguments, found: Any) -> Tensor:
    """Byte by byte, from the written-out layout."""
    pages, rows, dims, rotated = given
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    powers = torch.tensor([2.0 ** (n - 127) for n in range(255)] + [NAN], dtype=torch.float64)
    tokens, straight = _tokens(pages.shape[1], dims, rotated), dims - rotated
    out = torch.zeros(len(rows), dims, dtype=BF16)
    for n, row in enumerate(rows.tolist()):
        if row < 0:
            continue
        page, slot = pages[row // tokens], row % tokens
        data = page[slot * (dims + rotated) :][: dims + rotated]
        scales = page[tokens * (dims + rotated) + slot * _scale_bytes(dims, rotated) :]
        for i in range(straight):
            out[n, i] = table[data[i].int()] * powers[scales[i // 64].int()]
        out[n, straight:] = data[straight:].clone().view(BF16)
    return out


def _read() -> Iterator[Case]:
    case = partial(Case, op=read_kv, tokens=(1,), oracle=decoded, moved=_read_bytes)
    for label, rows, shape, page in (
        ("one token", [70], SHAPE, PAGE),
        ("any order, some twice", [130, 2, 67, 67, 1, 0, 190], SHAPE, PAGE),
        ("some absent", [-1, 5, 63, -1], SHAPE, PAGE),
        ("no token", [], SHAPE, PAGE),
        ("pages of three rows", [8, 1, 3], SHAPE, 3),
    ):
        yield case(name=label, make=partial(_written, rows, shape, page))
    for dims, rotated in ((128, 64), (200, 64), (640, 64)):
        make = partial(_written, [0, 9, 17], (dims, rotated), PAGE)
        yield case(name=f"{dims} wide, {rotated} rotated", make=make, refusable=True)
    yield case(name="any bytes", make=partial(_bytes, 6))
    for tokens in (1, MANY):
        size = size_of(tokens, 512)
        make = partial(_bytes, tokens)
        oracle = None if size == "big" else decoded
        yield case(name=f"flash {tokens}", make=make, size=size, bench="flash", oracle=oracle)


def _written(rows: list[int], shape: tuple[int, int], page: int) -> Arguments:
    given = _given(list(range(0, 192, 3)), FP32, shape, page)
    write_kv.reference(*given)
    return given[4], torch.tensor(rows).long(), *shape


def _bytes(tokens: int) -> Arguments:
    """Every byte occurs, NaN and the scales of 2^-127 and of NaN among them."""
    *_, pages, rows = _spread(tokens)
    return pages, rows, *SHAPE
