"""The Lightning indexer over stored keys: a logit for every key that a token may see."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4.ops.index import KEY_BLOCK
from dsv4.ops.op import op
from dsv4.quant.index_keys import DIMS, KEY_LAYOUTS, KeyLayout
from dsv4.quant.paged import read_rows


@op
def index_logits(
    q: Tensor,
    q_scales: Tensor,
    weights: Tensor,
    pages: Tensor,
    table: Tensor,
    slots: Tensor,
    visible: Tensor,
    width: int,
) -> Tensor:
    """logit(t, n) = sum over heads of weight * relu(q . k_n), summed in FP32 of what is stored; spec 7.7.

    q: [T, H, bytes] and q_scales: [T, H, 4] uint8, the numbers and scales of one of KEY_LAYOUTS, by its bytes;
    weights: [T, H] FP32 of either sign, scales of `head_weights` folded in; pages: uint8, of the same layout; table:
    [sequences, n] int64, the pages of each; slots: [T] int64, the row of `table` of each token's sequence; visible: [T]
    int64, how many of its first keys a token sees; width: a multiple of 64. Returns [T, width] FP32: -inf from
    `visible` on, whatever stands in `table` there. NaN where key, query or weight is NaN.

    `index_scores` rounds to BF16 after each step as the reference implementation does; this rounds nothing.
    """
    layout = layout_of(q)
    queries = layout.decode(q, q_scales).transpose(1, 2)
    parts = []
    for first in range(0, width, KEY_BLOCK):
        numbers = torch.arange(first, first + KEY_BLOCK, device=q.device)
        seen = numbers < visible.unsqueeze(1)
        keys = read_keys(pages, table, slots, numbers.where(seen, 0), layout)
        logits = (torch.bmm(keys, queries).relu() * weights.unsqueeze(1)).sum(-1)
        parts.append(logits.masked_fill_(~seen, -math.inf))
    return torch.cat(parts, 1) if parts else q.new_empty(len(q), 0, dtype=torch.float32)


def layout_of(q: Tensor) -> KeyLayout:
    """The layout whose vectors have as many bytes as those of q."""
    return next(one for one in KEY_LAYOUTS.values() if one.data_bytes == q.shape[-1])


def read_keys(pages: Tensor, table: Tensor, slots: Tensor, numbers: Tensor, layout: KeyLayout) -> Tensor:
    """Keys `numbers` [T, n] of the sequences `slots` [T], decoded: FP32 [T, n, 128]. A page below 0 is page 0."""
    count = layout.page_rows(pages.shape[1])
    page = table[slots.unsqueeze(1), numbers // count].clamp(min=0)
    stored = read_rows(layout, pages, (page * count + numbers % count).flatten())
    return layout.decode(*stored).view(*numbers.shape, DIMS)
