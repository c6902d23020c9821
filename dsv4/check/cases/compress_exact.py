"""Compressors by the definition, one block and one token after another, and what they have to read and write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16
from dsv4.check.contract import Arguments


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
