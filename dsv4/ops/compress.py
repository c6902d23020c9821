"""Pooling of m tokens into one cache row, by a softmax over learned scores, separately in every channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops.linear import matmul
from dsv4.ops.norm import rms_norm
from dsv4.ops.op import op
from dsv4.ops.rope import Rotation, rope

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
