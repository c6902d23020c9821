"""Manifold-constrained hyper-connections: M parallel residual streams, mixed around every sublayer.

Equations: DeepSeek-V4 report (arXiv 2606.19348), section on mHC; order of operations as in the reference's
`hc_split_sinkhorn`. Everything here is FP32 except the streams, whose storage dtype is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops.linear import matmul


class Mixer(NamedTuple):
    """Weights of one mHC site, FP32. n = M * (2 + M) around a sublayer, n = M before the head."""

    fn: Tensor  # [n, M * d]
    base: Tensor  # [n]
    scale: Tensor  # [3], or [1] before the head


class Mixed(NamedTuple):
    """What `mhc_pre` hands on: the sublayer's input and how its output will be written back."""

    x: Tensor  # [T, d]
    post: Tensor  # [T, M] FP32
    comb: Tensor  # [T, M, M] FP32, rows: from stream, columns: to stream


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x). Spelt out: the library's own rounds differently at the end of a vector than inside it."""
    return 1 / (1 + torch.exp(-x))


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Turn [T, M, M] logits into nearly doubly stochastic matrices (FP32).

    The first iteration is a softmax over each row, plus eps, then a column step; every further one divides rows, then
    columns, by their sums plus eps.
    """
    exp = torch.exp(logits - logits.amax(-1, keepdim=True))
    a = exp / exp.sum(-1, keepdim=True) + eps
    a = a / (a.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        a = a / (a.sum(-1, keepdim=True) + eps)
        a = a / (a.sum(-2, keepdim=True) + eps)
    return a


def _mix(streams: Tensor, mixer: Mixer, norm_eps: float) -> Tensor:
    """The dynamic part: `fn` applied to all streams at once, divided by their joint RMS. [T, M, d] -> [T, n]."""
    flat = streams.flatten(1).float()
    return matmul(flat, mixer.fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def _weighted(streams: Tensor, weights: Tensor) -> Tensor:
    return (weights.unsqueeze(-1) * streams.float()).sum(1).to(streams.dtype)


def mhc_pre(streams: Tensor, mixer: Mixer, iterations: int, eps: float, norm_eps: float) -> Mixed:
    """Reduce the streams to one sublayer input and compute the weights of the way back.

    streams: [T, M, d]; returns x [T, d] in the streams' dtype, post [T, M] and comb [T, M, M] in FP32.
    pre = sigmoid(.) + eps, post = 2 sigmoid(.), comb = sinkhorn(.).
    """
    m = streams.shape[1]
    pre, post, comb = _mix(streams, mixer, norm_eps).split((m, m, m * m), 1)
    base_pre, base_post, base_comb = mixer.base.split((m, m, m * m))
    scale = mixer.scale
    weights = sigmoid(pre * scale[0] + base_pre) + eps
    doubled = 2 * sigmoid(post * scale[1] + base_post)
    matrix = sinkhorn((comb * scale[2] + base_comb).unflatten(1, (m, m)), iterations, eps)
    return Mixed(_weighted(streams, weights), doubled, matrix)


def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Write a sublayer's output back: stream k becomes post_k * y + sum_j comb_jk * stream_j.

    y: [T, d]; streams: [T, M, d], the sublayer's input streams; returns new streams of the same dtype.
    """
    carried = (comb.unsqueeze(-1) * streams.float().unsqueeze(2)).sum(1)
    return (post.unsqueeze(-1) * y.float().unsqueeze(1) + carried).to(streams.dtype)


def mhc_head(streams: Tensor, mixer: Mixer, eps: float, norm_eps: float) -> Tensor:
    """Reduce the streams to one vector before the last norm: [T, M, d] -> [T, d]. Only `pre` weights, no way back."""
    weights = sigmoid(_mix(streams, mixer, norm_eps) * mixer.scale + mixer.base) + eps
    return _weighted(streams, weights)
