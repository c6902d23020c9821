"""Compressors: what a step leaves in the ring and in the pages. Flash and Pro have the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.check.cases.compress_given import Run, given_kv, odd, rings
from dsv4.check.cases.inputs import BF16, BIG, MANY
from dsv4.check.cases.kv import pattern, places
from dsv4.check.cases.norm import exact_norm
from dsv4.check.cases.quantize import search
from dsv4.check.cases.rope import turned
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.compress import compress_kv
from dsv4.quant.formats import FP8_ROW

ALONE = (0, 4, 5)


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


def ending(given: Arguments) -> Tensor:
    """Tokens with which a block ends that is stored."""
    ape, (slots, positions, rows) = given[1], given[5]
    ends: Tensor = (slots >= 0) & (rows >= 0) & ((positions + 1) % ape.shape[0] == 0)
    return ends


def ring_of(given: Arguments) -> Tensor:
    terms: Tensor = given[6].terms
    return terms


def own_of(given: Arguments) -> Tensor:
    """The terms of each token, as the ring has them."""
    (slots, positions, _), ring = given[5], given[6]
    found: Tensor = ring.terms[slots.clamp(min=0) * ring.length + positions % ring.length]
    return found.masked_fill((slots < 0)[:, None, None], 0.0)


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


def exact_entries(given: Arguments, ends: Tensor) -> Tensor:
    """BF16 [B, D]. The step's tokens are found by slot and position."""
    projected, ape, norm, _, _, (slots, positions, _), ring = given[:7]
    ratio, dims = ape.shape[0], norm.shape[0]
    known = {place: n for n, place in enumerate(zip(slots.tolist(), positions.tolist(), strict=True))}
    terms = projected.unflatten(1, (2, -1))
    found = []
    for end in ends.nonzero().squeeze(1).tolist():
        slot, last = int(slots[end]), int(positions[end])
        rows = []
        for position in range(last + 1 - (2 * ratio if ratio == 4 else ratio), last + 1):
            if position < 0:
                continue
            here = known.get((slot, position))
            term = (
                ring.terms[slot * ring.length + position % ring.length]
                if here is None
                else terms[here] + ape[position % ratio]
            )
            old = ratio == 4 and position <= last - ratio
            rows.append(term[:, :dims] if old else term[:, -dims:])
        values, scores = torch.stack(rows).double().unbind(1)
        found.append((torch.softmax(scores, 0) * values).sum(0))
    return torch.stack(found).to(BF16) if found else norm.new_zeros(0, dims, dtype=BF16)


def keep_exactly(given: Arguments) -> None:
    """Write the ring, one token after another."""
    projected, ape, (slots, positions, _), ring = given[0], given[1], given[5], given[6]
    for n, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if slot >= 0:
            own = projected[n].view(2, -1) + ape[position % ape.shape[0]]
            ring.terms[slot * ring.length + position % ring.length] = own


def moved(given: Arguments, found: Any, row: int) -> int:
    """Terms of this step once, older ones of the blocks that end, what the ring keeps, and rows of so many bytes."""
    projected, ape, norm, _, by, (slots, *_), ring = given[:7]
    ratio, ends, tokens = ape.shape[0], ending(given), len(slots)
    span = 2 * ratio if ratio == 4 else ratio
    runs = torch.ones(tokens, dtype=torch.bool, device=slots.device)  # where a sequence begins
    runs[1:] = slots[1:] != slots[:-1]
    first = torch.where(runs, torch.arange(tokens, device=slots.device), 0).cummax(0).values
    within = torch.arange(tokens, device=slots.device) - first  # tokens of the sequence before this one
    older = int((span - 1 - within[ends]).clamp(min=0).sum())
    kept = tokens - int((within >= ring.length).sum())
    width = 4 * projected.shape[1]
    return int(
        tokens * (width + 24)
        + older * 2 * norm.nbytes
        + kept * width
        + min(tokens, ratio) * width // 2
        + norm.nbytes
        + ends.sum() * (row + 2 * 4 * by.cos.shape[1])
    )


def cases() -> Iterator[Case]:
    yield from _kv()


def _kv() -> Iterator[Case]:
    judged = partial(Case, op=compress_kv, writes=(6, 8), moved=partial(moved, row=584))
    for ratio in (4, 128):
        make = partial(given_kv, ratio)
        for label, runs, length in steps(ratio):
            bounds = near(*_counted(runs, ratio))
            small = sum(run.tokens for run in runs) <= 64
            yield judged(
                name=f"{label} of {ratio}",
                make=partial(make, runs, length),
                outcome=stored,
                bounds=bounds,
                unfused_bounds=bounds,
                oracle=exact,
                oracle_bounds=bounds,
                size="small" if small else "full",
            )
        ends = near(1, 1)
        odds = partial(judged, outcome=stored, bounds=ends, unfused_bounds=ends, oracle=exact, oracle_bounds=ends)
        yield odds(name=f"odd numbers of {ratio}", make=partial(odd, make, ratio))
        three = [Run(0, ratio - 1, 1), Run(1, 3 * ratio - 1, 1)]
        for label, how in (
            ("pages of three rows", {"page": 3}),
            ("pages apart", {"between": 72}),
            ("rows apart", {"beside": 8}),
        ):
            yield odds(name=f"{label}, {ratio}", make=partial(make, three, rings(ratio), **how))
        yield from timed(partial(judged, outcome=partial(stored, ring=own_of)), make, ratio, exact)
    refused = partial(judged, outcome=stored, refusable=True)
    one = [Run(0, 7, 1)]
    for dims, ratio, rotated in ((256, 4, 64), (512, 8, 64), (512, 4, 32), (200, 4, 64)):
        make = partial(given_kv, ratio, one, rings(ratio), dims=dims, rotated=rotated)
        yield refused(name=f"{dims} wide, {rotated} rotated, of {ratio}", make=make)
    bounds = near(BIG // 4, BIG)
    yield judged(
        name=f"{BIG} tokens",
        make=partial(given_kv, 4, [Run(0, 5, BIG)], 4096),
        outcome=stored,
        bounds=bounds,
        unfused_bounds=bounds,
        size="big",
    )
    yield judged(
        name="past 2 GiB",
        make=partial(given_kv, 4, [Run(n, 4 * n + 3, 8) for n in range(32)], 16, far=True),
        outcome=stored,
        bounds=near(64, 256),
        unfused_bounds=near(64, 256),
        size="big",
    )


def steps(ratio: int) -> Iterator[tuple[str, Sequence[Run], int]]:
    """Label, tokens of sequences, and how long the rings are."""
    usual = rings(ratio)
    yield "first block", [Run(0, 0, ratio)], usual
    yield "second block", [Run(1, ratio, ratio)], usual
    yield "a token that ends a block", [Run(0, 3 * ratio - 1, 1)], usual
    yield "a token that ends the first block", [Run(1, ratio - 1, 1)], usual
    yield "a token that ends none", [Run(0, 3 * ratio - 2, 1)], usual
    yield "a token that begins one", [Run(0, 3 * ratio, 1)], usual
    yield "no token", [], usual
    drafts = [Run(2, 3 * ratio - 2, 6), Run(0, ratio - 8 if ratio > 8 else 0, 8), Run(3, 5 * ratio - 1, 2)]
    yield "drafts across ends", drafts, usual
    nobody = Run(-1, 3, 1)
    yield "some that are nobody's", [nobody, Run(1, 2 * ratio - 3, 3), nobody, Run(0, ratio - 1, 1), nobody], usual
    yield "some not stored", [Run(1, 2 * ratio - 1, 1, stored=False), Run(2, ratio - 2, 2)], usual
    wrapped = [Run(n, 7 * ratio - 3 + n, 5) for n in range(3)]
    yield "rings that wrap around", wrapped, usual + 3
    yield "rings as short as can be", wrapped, usual - 8
    yield "more tokens than a ring has", [Run(1, ratio - 2, 3 * ratio + 3), Run(0, 1, 2)], usual - 7
    yield "all in one step", [Run(0, 0, 3 * ratio), Run(2, 1, ratio + 2), Run(1, ratio - 1, ratio)], 5 * ratio


def timed(judged: Any, make: Any, ratio: int, oracle: Any) -> Iterator[Case]:
    """Each token has the same terms wherever they are read from, so that it is the same alone."""
    length = rings(4) if ratio == 4 else 2 * ratio
    for tokens in (1, 64):
        for ends in (True, False):
            runs = [Run(n, 4096 - (1 if ends else 2), 1) for n in range(tokens)]
            bounds = near(tokens * ends, tokens)
            yield judged(
                name=f"{'ending' if ends else 'no end'} of {ratio}, {tokens}",
                make=partial(make, runs, length, settled=True),
                tokens=ALONE,
                bounds=bounds,
                unfused_bounds=bounds,
                oracle=partial(oracle, ring=own_of),
                oracle_bounds=bounds,
                size="small" if tokens == 1 else "full",
                bench="flash",
            )
    bounds = near(MANY // ratio, MANY)
    yield judged(
        name=f"prefill of {ratio}, {MANY}",
        make=partial(make, [Run(0, 3, MANY)], length, settled=True),
        tokens=ALONE,
        bounds=bounds,
        unfused_bounds=bounds,
        size="big",
        bench="flash",
    )


def _counted(runs: Sequence[Run], ratio: int) -> tuple[int, int]:
    """Blocks that end, and tokens."""
    ends = sum((run.start + run.tokens) // ratio - run.start // ratio for run in runs if run.slot >= 0 and run.stored)
    return ends, sum(run.tokens for run in runs)
