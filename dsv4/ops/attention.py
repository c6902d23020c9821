"""Attention of each token over a list of cache rows, with a sink."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # entries per step of the running softmax, as in the reference kernel


def window_positions(positions: Tensor, window: int) -> Tensor:
    """Positions t - window + 1 .. t, oldest first, those that exist; -1 at the end. [T] -> [T, window]."""
    first = (positions - (window - 1)).clamp(min=0)
    span = first.unsqueeze(1) + torch.arange(window, device=positions.device)
    return span.masked_fill(span > positions.unsqueeze(1), -1)


def sparse_attention(q: Tensor, pool: Tensor, rows: Tensor, sink: Tensor) -> Tensor:
    """Softmax attention in which every row of the pool is key and value at once.

    q: [T, H, D]; pool: [N, D]; rows: [T, n] rows of the pool, -1 for none, each token's first entry valid;
    sink: [H] FP32 logits that take part in the denominator only; scale D^-1/2. Returns [T, H, D] in q's dtype.
    Scores, sums and the accumulator are FP32; probabilities are rounded to q's dtype before they weigh the values.
    Runs over blocks of 64 entries with a running maximum. A block without entries changes no bit.
    """
    rows = F.pad(rows, (0, -rows.shape[1] % BLOCK), value=-1)
    query = q.float()
    scale = q.shape[-1] ** -0.5
    peak: Tensor | None = None
    total = acc = torch.zeros(())
    for block in rows.split(BLOCK, 1):
        kv = pool[block.clamp(min=0)].float()
        absent = (block < 0).unsqueeze(1)
        scores = (torch.bmm(query, kv.transpose(1, 2)) * scale).masked_fill(absent, float("-inf"))
        best = scores.amax(-1, keepdim=True)
        new = best if peak is None else torch.maximum(peak, best)
        exp = torch.exp(scores - new)
        weighed = torch.bmm(exp.to(q.dtype).float(), kv.masked_fill(absent.transpose(1, 2), 0))
        if peak is None:
            total, acc = exp.sum(-1, keepdim=True), weighed
        else:
            keep = torch.exp(peak - new)
            total, acc = total * keep + exp.sum(-1, keepdim=True), acc * keep + weighed
        peak = new
    assert peak is not None
    total = total + torch.exp(sink.view(1, -1, 1) - peak)
    return (acc / total).to(q.dtype)
