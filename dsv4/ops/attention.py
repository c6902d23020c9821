"""Attention of each token over a list of cache rows, with a sink."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.ops.op import op

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
