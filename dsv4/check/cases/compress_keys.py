"""Compressors of index keys: their bytes, spelt out here once more, with and without the Hadamard matrix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.check.cases.compress_exact import ending, exact_entries, keep_exactly, moved, ring_of
from dsv4.check.cases.compress_given import Run, given_keys, rings
from dsv4.check.cases.compress_steps import Judged, large, listed
from dsv4.check.cases.inputs import BF16
from dsv4.check.cases.kv import pattern
from dsv4.check.cases.norm import exact_norm
from dsv4.check.cases.quantize import search
from dsv4.check.cases.rope import turned
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.compress import compress_keys
from dsv4.quant import e2m1
from dsv4.quant.formats import FP8_ROW, MXFP4
from dsv4.quant.index_keys import FP4_KEYS, FP8_KEYS
from dsv4.quant.tensor import QTensor

SIZES = {"fp4": (64, 4), "fp8": (128, 4)}  # bytes of a key's numbers, and of its scales


def near(ends: int, tokens: int) -> Bounds:
    """As for rows of keys and values; what was rounded otherwise is spread over all numbers of its key.

    Those near zero, where E4M3 has its finest steps, move by several.
    """
    share = 0.024 * ends / max(tokens, 1)
    return {"e2m1": Bound("ulp", 1, share), "e4m3": Bound("ulp", 32, share)}


def places(rows: Tensor, pages: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Every byte of the keys and of their scales, counted from the first page's first: [T, bytes]."""
    count = pages.shape[1] // sum(SIZES[name])
    start, slot = rows // count * pages.shape[1], rows % count
    first = (start + slot * SIZES[name][0], start + count * SIZES[name][0] + slot * SIZES[name][1])
    spans = (torch.arange(size, device=rows.device) for size in SIZES[name])
    data, scales = (at.unsqueeze(1) + span for at, span in zip(first, spans, strict=True))
    return data, scales


def numbers(data: Tensor, scales: Tensor, name: str) -> Any:
    """Bytes as the numbers that they are."""
    if name == "fp4":
        return QTensor(data.contiguous().view(torch.int8), scales, MXFP4)
    return {"data": data.contiguous().view(torch.float8_e4m3fn), "scale": scales}


def stored(given: Arguments, found: Any, ring: Any = ring_of) -> dict[str, Any]:
    """The key of every token that ends a block, zeros for the others; bytes elsewhere that are not what they were."""
    tokens, pages, name, ends = given[5], given[8], given[9].name, ending(given)
    data, scales = (
        pages.flatten()[at].masked_fill(~ends.unsqueeze(1), 0)
        for at in places(torch.where(ends, tokens.rows, 0), pages, name)
    )
    before = pattern(pages.shape[0], pages.shape[1], pages.device)
    for at in places(tokens.rows[ends], pages, name):
        before.view(-1)[at] = pages.flatten()[at]
    return {"keys": numbers(data, scales, name), "elsewhere": (before != pages).sum(), "ring": ring(given)}


def exact(given: Arguments, found: Any, ring: Any = ring_of) -> dict[str, Any]:
    """In FP64, one block after another, each step rounded; the nearest codes by search."""
    norm, eps, by = given[2:5]
    name, spread, ends = given[9].name, given[10], ending(given)
    x = turned(exact_norm(exact_entries(given, ends), norm, eps), type(by)(by.cos[ends], by.sin[ends]))
    if spread:
        x = (x.double() @ sylvester(128) * 128**-0.5).to(BF16)
    fmt, block = (MXFP4, 32) if name == "fp4" else (FP8_ROW, 128)
    codes, found_scales = (torch.from_numpy(part) for part in search(x, fmt, block, np.array(1, np.float32)))
    data, scales = (torch.zeros(len(ends), size, dtype=torch.uint8) for size in SIZES[name])
    if name == "fp8":  # the same powers of two, as FP32
        powers = torch.tensor([2.0 ** (n - 127) for n in range(255)] + [float("nan")])
        found_scales = powers[found_scales.long()].view(torch.uint8)
    data[ends], scales[ends] = (e2m1.pack(codes) if name == "fp4" else codes), found_scales
    keep_exactly(given)
    return {"keys": numbers(data, scales, name), "elsewhere": torch.tensor(0), "ring": ring(given)}


def sylvester(n: int) -> Tensor:
    """1 where row and column have an even number of ones in common, else -1. FP64."""
    common = torch.arange(n).unsqueeze(1) & torch.arange(n)
    ones = sum(common >> bit & 1 for bit in range(n.bit_length()))
    return 1.0 - 2.0 * (ones % 2).double()  # type: ignore[union-attr]


def cases() -> Iterator[Case]:
    for layout, spread in ((FP4_KEYS, True), (FP8_KEYS, True), (FP8_KEYS, False)):
        more = f", {layout.name}{'' if spread else ' plain'}"
        judged = partial(Case, op=compress_keys, writes=(6, 8), moved=partial(moved, row=sum(SIZES[layout.name])))
        keys = Judged(judged, partial(given_keys, layout, spread), near, stored, exact)
        yield from listed(keys, 4, more)
        if spread:
            yield from large(keys, more)
        for ratio in (8, 128):
            make = partial(given_keys, layout, spread, ratio, [Run(0, ratio - 1, 1)], rings(ratio))
            yield judged(name=f"of {ratio}{more}", make=make, outcome=stored, refusable=True)
