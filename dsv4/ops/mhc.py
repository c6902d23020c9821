"""Manifold-constrained hyper-connections: M parallel residual streams, mixed around every sublayer.

Equations: DeepSeek-V4 report (arXiv 2606.19348), section on mHC; order of operations as in the reference's
`hc_split_sinkhorn`. Everything here is FP32 except the streams, whose storage dtype is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops.linear import matmul, widen
from dsv4.ops.norm import rms_norm_quant
from dsv4.ops.op import op
from dsv4.quant.formats import Format
from dsv4.quant.rows import GlobalScale
from dsv4.quant.tensor import QTensor


class Mixer(NamedTuple):
    """Weights of one mHC site, FP32. n = M * (2 + M) around a sublayer, n = M before the head."""

    fn: Tensor  # [n, M * d]
    base: Tensor  # [n]
    scale: Tensor  # [n]: the stored factors (pre, post, comb; or one before the head), each repeated for its rows


class Mixed(NamedTuple):
    """What `mhc_pre` hands on: the sublayer's input and how its output will be written back."""

    x: Tensor  # [T, d]
    post: Tensor  # [T, M] FP32
    comb: Tensor  # [T, M, M] FP32, rows: from stream, columns: to stream
    streams: Tensor  # [T, M, d], the streams that were read


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x). Spelt out: the library's own rounds differently at the end of a vector than inside it."""
    return torch.reciprocal(1 + torch.exp(-x))


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Turn [T, M, M] logits into nearly doubly stochastic matrices (FP32).

    The first iteration is a softmax over each row, plus eps, then a column step; every further one divides rows, then
    columns, by their sums plus eps.
    """
    exp = torch.exp(logits - logits.amax(-1, keepdim=True))
    a = exp / exp.sum(-1, keepdim=True) + eps
    count, size, _ = a.shape
    row, row_eps = a.new_ones(count, 1, size), a.new_full((count, 1, size), eps)
    column, column_eps = row.mT, row_eps.mT
    for step in range(iterations):
        if step:
            a /= torch.baddbmm(column_eps, a, column)  # row sums plus eps, as one op
        a /= torch.baddbmm(row_eps, row, a)
    return a


def _mix(wide: Tensor, mixer: Mixer, norm_eps: float) -> Tensor:
    """The n dynamic logits of each token: `fn` applied to all streams at once, divided by their joint RMS, scaled."""
    flat = wide.flatten(1)
    mixed = matmul(flat, mixer.fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return mixed * mixer.scale + mixer.base


def _weighted(wide: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.bmm(weights.unsqueeze(1), wide).squeeze(1).type(dtype)


@op
def mhc_pre(streams: Tensor, mixer: Mixer, iterations: int, eps: float, norm_eps: float) -> Mixed:
    """Reduce the streams to one sublayer input and compute the weights of the way back.

    streams: [T, M, d]; returns x [T, d] in the streams' dtype, the rest in FP32.
    pre = sigmoid(.) + eps, post = 2 sigmoid(.), comb = sinkhorn(.).
    """
    count, m, _ = streams.shape
    wide = streams.float()
    mixed = _mix(wide, mixer, norm_eps)
    gates = sigmoid(mixed[:, : 2 * m])
    x = _weighted(wide, gates[:, :m] + eps, streams.dtype)
    return Mixed(x, 2 * gates[:, m:], sinkhorn(mixed[:, 2 * m :].view(count, m, m), iterations, eps), streams)


@op
def mhc_post(y: Tensor, mixed: Mixed) -> Tensor:
    """Write a sublayer's output back: stream k becomes post_k * y + sum_j comb_jk * stream_j.

    y: [T, d]; mixed: of the `mhc_pre` that made the sublayer's input; returns streams [T, M, d] in y's dtype.
    """
    carried = (mixed.comb.unsqueeze(3) * widen(mixed.streams).unsqueeze(2)).sum(1)
    return (mixed.post.unsqueeze(2) * y.float().unsqueeze(1) + carried).type(y.dtype)


@op
def mhc_head(streams: Tensor, mixer: Mixer, eps: float, norm_eps: float) -> Tensor:
    """Reduce the streams to one vector before the last norm: [T, M, d] -> [T, d]. Only `pre` weights, no way back."""
    wide = streams.float()
    return _weighted(wide, sigmoid(_mix(wide, mixer, norm_eps)) + eps, streams.dtype)


@op
def mhc_pre_norm_quant(
    streams: Tensor,
    mixer: Mixer,
    iterations: int,
    eps: float,
    norm_eps: float,
    weight: Tensor,
    fmt: Format,
    scale: GlobalScale = None,
) -> tuple[Mixed, Tensor, QTensor]:
    """`mhc_pre`, then `rms_norm_quant` of its x: what a sublayer reads. weight: [d] FP32 of the norm."""
    mixed = mhc_pre(streams, mixer, iterations, eps, norm_eps)
    return (mixed, *rms_norm_quant(mixed.x, weight, norm_eps, fmt, scale))


@op
def mhc_post_pre_norm_quant(
    y: Tensor,
    mixed: Mixed,
    mixer: Mixer,
    iterations: int,
    eps: float,
    norm_eps: float,
    weight: Tensor,
    fmt: Format,
    scale: GlobalScale = None,
) -> tuple[Tensor, Mixed, Tensor, QTensor]:
    """All that lies between two sublayers: `mhc_post` of the one, then `mhc_pre_norm_quant` of the next.

    y, mixed: of the sublayer that has just run; mixer, weight: of the next. The first result is the new streams.
    """
    streams = mhc_post(y, mixed)
    return (streams, *mhc_pre_norm_quant(streams, mixer, iterations, eps, norm_eps, weight, fmt, scale))
