"""Pooling of m tokens into one cache row, by a softmax over learned scores, separately in every channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops.kv import write_kv
from dsv4.ops.linear import matmul
from dsv4.ops.norm import rms_norm
from dsv4.ops.op import op
from dsv4.ops.quantize import hadamard
from dsv4.ops.rope import Rotation, rope
from dsv4.quant.index_keys import KeyLayout
from dsv4.quant.paged import write_rows

OVERLAPPED = 4  # the ratio whose blocks overlap by one


class Compressor(NamedTuple):
    """Weights of one compressor. C = 2 * D when overlapped (halves A and B), else D."""

    project: Tensor  # [2 * C, d], any float dtype: values, then scores (wkv, then wgate)
    ape: Tensor  # [m, 2, C] FP32: zeros for the values, the position bias for the scores
    norm: Tensor  # [D] FP32


@op
def compressor_terms(x: Tensor, weights: Compressor, positions: Tensor) -> Tensor:
    """What each token adds to the blocks it belongs to: [T, 2, C] FP32, values then scores.

    x: [T, d]; positions: [T]. The position bias is added to the score alone, by the position inside the block.
    """
    terms = matmul(x, weights.project).view(x.shape[0], 2, -1)
    return terms + weights.ape[positions % weights.ape.shape[0]]


def block_tokens(ends: Tensor, ratio: int) -> Tensor:
    """Positions whose terms a block needs: [B, n], n = 2 * ratio if overlapped, else ratio; may be negative.

    ends: [B] position of the last token of each block. Overlapped: the block before, then the block itself.
    """
    span = 2 * ratio if ratio == OVERLAPPED else ratio
    return ends.unsqueeze(1) + torch.arange(1 - span, 1, device=ends.device)


@op
def pool(terms: Tensor, tokens: Tensor, ratio: int, dtype: torch.dtype) -> Tensor:
    """One entry per block: sum over its slots of softmax(score) * value, per channel, FP32, rounded to `dtype`.

    terms: [B, n, 2, C] of `block_tokens`; tokens: [B, n] their positions (negative: before the sequence, weight 0).
    Overlapped blocks read half A of the previous block's tokens and half B of their own. Returns [B, D].
    """
    if ratio == OVERLAPPED:
        half = terms.shape[-1] // 2
        terms = torch.cat((terms[:, :ratio, :, :half], terms[:, ratio:, :, half:]), 1)
    values, scores = terms.unbind(2)
    absent = (tokens < 0).unsqueeze(-1)
    scores = scores.masked_fill(absent, float("-inf"))
    exp = torch.exp(scores - scores.amax(1, keepdim=True))
    weights = exp / exp.sum(1, keepdim=True)
    return (values.masked_fill(absent, 0) * weights).sum(1).type(dtype)


@op
def finish_entry(entry: Tensor, norm: Tensor, turn: Rotation, eps: float) -> Tensor:
    """Normalise pooled entries and rotate them to their block's first position. entry: [B, D]; returns the same."""
    return rope(rms_norm(entry, norm, eps), turn)


class StepTokens(NamedTuple):
    """T tokens of a step: those of one sequence stand one after another, at positions that follow each other."""

    slots: Tensor  # [T] int64 whose ring; negative: nobody's, and nothing is read or written for it
    positions: Tensor  # [T] int64, below 2^31
    rows: Tensor  # [T] int64 where the entry of the block goes that ends with the token; negative: it is not stored


class Ring(NamedTuple):
    """What a compressor remembers of every sequence: its last terms."""

    terms: Tensor  # [slots * length, 2, C] FP32: those of position p of slot s in row s * length + p mod length
    length: int  # at least as many as `block_tokens` gives, less one


@op
def compress_kv(
    projected: Tensor,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    turn: Rotation,
    tokens: StepTokens,
    ring: Ring,
    most: int,
    pages: Tensor,
) -> None:
    """Remember what T tokens add to their blocks, and store the entries of the blocks that end with one of them.

    projected: [T, 2 * C] FP32 of the product with `Compressor.project`; ape, norm: of `Compressor`; turn: rotations of
    the first positions of the tokens' blocks, [T, R]; most: tokens that one sequence has here, at most; pages: uint8
    [P, page bytes] of `KvRow`, rows numbered as for `write_kv`. Entries are rounded to BF16 before the norm.

    An entry is pooled from the terms of this step, where its tokens are of it, and else from the ring as it was before.
    Then the ring has the terms of every token here but those that a later one, `length` positions on, takes the place
    of. So a chunk may be longer than the ring, and what was written of tokens that are taken back is not read again.
    Mutates `pages` and `ring`.
    """
    entries, ends = _pooled(projected, ape, tokens, ring)
    write_kv(entries, norm, eps, Rotation(turn.cos[ends], turn.sin[ends]), pages, tokens.rows[ends])


@op
def compress_keys(
    projected: Tensor,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    turn: Rotation,
    tokens: StepTokens,
    ring: Ring,
    most: int,
    pages: Tensor,
    layout: KeyLayout,
    spread: bool = True,
) -> None:
    """`compress_kv` of the indexer's keys; pages: uint8 [P, page bytes] of `layout`.

    spread: over their dimensions by a Hadamard matrix and rounded to BF16, as queries that meet them have to be too.
    Mutates `pages` and `ring`.
    """
    entries, ends = _pooled(projected, ape, tokens, ring)
    keys = finish_entry(entries, norm, Rotation(turn.cos[ends], turn.sin[ends]), eps)
    write_rows(layout, pages, tokens.rows[ends], *layout.encode(hadamard(keys) if spread else keys))


def _pooled(projected: Tensor, ape: Tensor, tokens: StepTokens, ring: Ring) -> tuple[Tensor, Tensor]:
    """Entries of the blocks that end here and are stored, [B, D] BF16, and by which tokens, [B]. Writes the ring."""
    (slots, positions, rows), ratio, count = tokens, ape.shape[0], len(projected)
    terms = projected.unflatten(1, (2, -1)) + ape[positions % ratio]
    ends = ((slots >= 0) & (rows >= 0) & ((positions + 1) % ratio == 0)).nonzero().squeeze(1)
    needed = block_tokens(positions[ends], ratio)
    at, here = _in_step(tokens, ends.unsqueeze(1), needed - positions[ends].unsqueeze(1))
    older = ring.terms[slots[ends].unsqueeze(1) * ring.length + needed % ring.length]
    entries = pool(torch.where(here[..., None, None], terms[at], older), needed, ratio, torch.bfloat16)
    everyone = torch.arange(count, device=slots.device)
    kept = (slots >= 0) & ~_in_step(tokens, everyone, torch.full_like(everyone, ring.length))[1]
    ring.terms[(slots * ring.length + positions % ring.length)[kept]] = terms[kept]
    return entries, ends


def _in_step(tokens: StepTokens, of: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the step the token stands that is so many positions behind these, and whether it is there at all."""
    slots, positions, _ = tokens
    at = (of + steps).clamp(0, max(len(slots) - 1, 0))
    inside = (at == of + steps) & (slots[at] == slots[of]) & (positions[at] == positions[of] + steps)
    return at, inside
