"""Compressors: what a step leaves in the ring and in the pages. Flash and Pro have the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.check.cases import compress_keys
from dsv4.check.cases.compress_exact import ending, exact_entries, keep_exactly, moved, ring_of
from dsv4.check.cases.compress_given import Run, given_kv, rings
from dsv4.check.cases.compress_steps import Judged, large, listed
from dsv4.check.cases.inputs import BF16
from dsv4.check.cases.kv import pattern, places
from dsv4.check.cases.norm import exact_norm
from dsv4.check.cases.quantize import search
from dsv4.check.cases.rope import turned
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.compress import compress_kv
from dsv4.quant.formats import FP8_ROW


def near(ends: int, tokens: int) -> Bounds:
    """A sum in another order, or another exponential, turns a rounding to BF16 now and then, and a code behind it.

    Where two numbers nearly cancel in a rotation, one that was turned counts for more. Tokens that end no block have
    zeros here.
    """
    part = ends / max(tokens, 1)
    return {
        "numbers": Bound("ulp", 1, share=0.003 * part),
        "turned": Bound("ulp", 128, share=0.016 * part, floor=2.0**-22),
    }


def stored(given: Arguments, found: Any, ring: Any = ring_of) -> dict[str, Tensor]:
    """The row of every token that ends a block, zeros for the others; bytes elsewhere that are not what they were."""
    norm, by, tokens, pages = given[2], given[4], given[5], given[8]
    ends, shape = ending(given), (norm.shape[0], by.cos.shape[1])
    data, scales = (
        pages.flatten()[at].masked_fill(~ends.unsqueeze(1), 0)
        for at in places(torch.where(ends, tokens.rows, 0), pages, *shape)
    )
    before = pattern(pages.shape[0], pages.shape[1], pages.device)
    for at in places(tokens.rows[ends], pages, *shape):
        before.view(-1)[at] = pages.flatten()[at]
    straight = shape[0] - shape[1]
    return {
        "numbers": data[:, :straight].contiguous().view(torch.float8_e4m3fn),
        "turned": data[:, straight:].contiguous().view(BF16),
        "scales": scales,
        "elsewhere": (before != pages).sum(),
        "ring": ring(given),
    }


def exact(given: Arguments, found: Any, ring: Any = ring_of) -> dict[str, Tensor]:
    """One block after another, in FP64 and by the definition; the nearest codes by search; the ring token by token."""
    norm, eps, by = given[2:5]
    ends = ending(given)
    entries = exact_entries(given, ends)
    x = turned(exact_norm(entries, norm, eps), type(by)(by.cos[ends], by.sin[ends]))
    straight = norm.shape[0] - by.cos.shape[1]
    codes, scales = search(x[:, :straight], FP8_ROW, 64, np.array(1, np.float32))
    numbers, turns = torch.zeros(len(ends), straight, dtype=torch.uint8), torch.zeros(len(ends), 64, dtype=BF16)
    padded = torch.zeros(len(ends), 8, dtype=torch.uint8)
    numbers[ends], turns[ends] = torch.from_numpy(codes), x[:, straight:].to(BF16)
    padded[ends, : scales.shape[1]] = torch.from_numpy(scales)
    keep_exactly(given)
    return {
        "numbers": numbers.view(torch.float8_e4m3fn),
        "turned": turns,
        "scales": padded,
        "elsewhere": torch.tensor(0),
        "ring": ring(given),
    }


def cases() -> Iterator[Case]:
    judged = partial(Case, op=compress_kv, writes=(6, 8), moved=partial(moved, row=584))
    kv = Judged(judged, given_kv, near, stored, exact)
    for ratio in (4, 128):
        yield from listed(kv, ratio)
    yield from large(kv)
    for dims, ratio, rotated in ((256, 4, 64), (512, 8, 64), (512, 4, 32), (200, 4, 64)):
        make = partial(given_kv, ratio, [Run(0, 7, 1)], rings(ratio), dims=dims, rotated=rotated)
        name = f"{dims} wide, {rotated} rotated, of {ratio}"
        yield judged(name=name, make=make, outcome=stored, refusable=True)
    yield from compress_keys.cases()
