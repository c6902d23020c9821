"""Attention of each token over a list of cache rows, with a sink."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.ops.kv import read_kv
from dsv4.ops.op import op
from dsv4.ops.quantize import quantize
from dsv4.ops.rope import Rotation, rope
from dsv4.quant.formats import FP8_ROW
from dsv4.quant.tensor import QTensor

BLOCK = 64  # entries per step of the running softmax, as in the reference kernel
GATHERED = 1 << 26  # numbers gathered from the pool at once


def window_positions(positions: Tensor, window: int) -> Tensor:
    """Positions t - window + 1 .. t, oldest first, those that exist; -1 at the end. [T] -> [T, window]."""
    first = (positions - (window - 1)).clamp(min=0)
    span = first.unsqueeze(1) + torch.arange(window, device=positions.device)
    return span.masked_fill(span > positions.unsqueeze(1), -1)


@op
def sparse_attention(q: Tensor, pool: Tensor, rows: Tensor, sink: Tensor) -> Tensor:
    """Softmax attention in which every row of the pool is key and value at once.

    q: [T, H, D]; pool: [N, D]; rows: [T, n] rows of the pool, -1 for none, each token's first entry valid;
    sink: [H] FP32 logits that take part in the denominator only; scale D^-1/2. Returns [T, H, D] in q's dtype.
    Scores, sums and the accumulator are FP32; probabilities are rounded to q's dtype before they weigh the values,
    relative to the running maximum over blocks of 64 entries. A block without entries changes no bit.
    """
    rows = F.pad(rows, (0, -rows.shape[1] % BLOCK), value=-1)
    at_once = max(1, GATHERED // (rows.shape[1] * pool.shape[1]))
    if len(q) <= at_once:
        return _attend(q, pool, rows, sink)
    parts = zip(q.split(at_once), rows.split(at_once), strict=True)
    return torch.cat([_attend(q_part, pool, rows_part, sink) for q_part, rows_part in parts])


def _attend(q: Tensor, pool: Tensor, rows: Tensor, sink: Tensor) -> Tensor:
    tokens, heads, dim = q.shape
    blocks = rows.shape[1] // BLOCK
    absent = rows < 0
    # An absent entry has weight 0, which no one else's NaN may spoil: it reads the token's own first row.
    kv = pool[torch.where(absent, rows[:, :1], rows)].float().view(-1, BLOCK, dim)
    scores = torch.bmm(q.float().repeat_interleave(blocks, 0), kv.mT) * dim**-0.5
    scores = scores.masked_fill(absent.view(-1, 1, BLOCK), float("-inf")).view(tokens, blocks, heads, BLOCK)
    peak = scores.amax(-1, keepdim=True).cummax(1).values
    exp = torch.exp(scores - peak)
    weighed = torch.bmm(exp.type(q.dtype).float().view(-1, heads, BLOCK), kv).view(tokens, blocks, heads, dim)
    keep = torch.exp(peak[:, :-1] - peak[:, 1:]).unbind(1)
    (total, *masses), (acc, *others) = exp.sum(-1, keepdim=True).unbind(1), weighed.unbind(1)
    for kept, mass, other in zip(keep, masses, others, strict=True):
        total, acc = total * kept + mass, acc * kept + other
    return (acc / (total + torch.exp(sink.view(-1, 1) - peak[:, -1]))).type(q.dtype)


def vectors(pages: Tensor, rows: Tensor, dims: int, rotated: int) -> Tensor:
    """Those of the rows of pages, or of rows that are decoded; zeros for none. [N] -> [N, D]"""
    if pages.dtype == torch.uint8:
        return read_kv(pages, rows, dims, rotated)
    return pages[rows.clamp(min=0)].masked_fill((rows < 0).unsqueeze(1), 0.0)


@op
def attend(
    q: Tensor, near: Tensor, near_rows: Tensor, far: Tensor, far_rows: Tensor, sink: Tensor, turn: Rotation
) -> Tensor:
    """The context's side of a layer: `sparse_attention` over stored rows, its values turned back by the query's angle.

    q: [T, H, D], normalised and rotated; near, far: uint8 pages of `KvRow`, of the window and of pooled entries, maybe
    the same tensor, or both BF16 [N, D], rows that `read_kv` has decoded; near_rows: [T, n1], far_rows: [T, n2] int64
    rows of these, -1 for none, n2 may be 0; sink: [H] FP32; turn: rotations of the T positions. Returns [T, H, D] in
    q's dtype: what wo_a reads officially. Each token's first entry is valid, or none of its entries is: then its values
    are zeros. Absent entries behind the others change no bit, nor does it matter whether rows were decoded before.
    """
    dims, rotated = q.shape[-1], turn.cos.shape[-1]
    lists = ((near, near_rows), (far, far_rows))
    pool = torch.cat([vectors(pages, rows.flatten(), dims, rotated) for pages, rows in lists])
    rows = torch.cat((near_rows, far_rows), 1)
    first, second = torch.arange(rows.numel(), device=rows.device).split((near_rows.numel(), far_rows.numel()))
    numbers = torch.cat((first.view(near_rows.shape), second.view(far_rows.shape)), 1)
    values = sparse_attention(q, pool, numbers.masked_fill(rows < 0, -1), sink)
    return rope(values.masked_fill_((rows < 0).all(1).view(-1, 1, 1), 0.0), turn, inverse=True)


@op
def attend_quant(
    q: Tensor, near: Tensor, near_rows: Tensor, far: Tensor, far_rows: Tensor, sink: Tensor, turn: Rotation
) -> QTensor:
    """`attend`, and its values as `quantize` stores them for a wo_a in FP8: FP8_ROW [T, H * D].

    Serving stacks run wo_a so, the official model does not. A group of heads is a run of a row, its scales one of the
    row's scales: 128 divides D.
    """
    return quantize(attend(q, near, near_rows, far, far_rows, sink, turn).flatten(1), FP8_ROW)
