"""The Lightning indexer: which compressed rows a token attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.linear import matmul
from dsv4.ops.op import op

KEY_BLOCK = 64  # keys scored at once; fixed, so that a score does not depend on how many keys there are


@op
def head_weights(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Signed weight of each index head: [T, d] x [H, d] -> [T, H] in x's dtype.

    dim: width of an index head. The scale of scores and heads, (dim * H)^-1/2, is folded in.
    """
    return torch.mul(matmul(x, weight).type(x.dtype), (dim * weight.shape[0]) ** -0.5)


@op
def index_scores(q: Tensor, weights: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """score(t, w) = sum over heads of weight * relu(q . k_w), rounded to q's dtype after each step as in the reference.

    q: [T, H, D]; weights: [T, H]; keys: [N, D] pool; rows: [T, W] pool rows of each token's candidates, W a multiple of
    64; returns [T, W] FP32. Rows of candidates that a token may not see are harmless: the selection ignores them.
    """
    queries = q.float().transpose(1, 2)
    scores = []
    for block in rows.split(KEY_BLOCK, 1):
        dots = torch.bmm(keys[block].float(), queries).type(q.dtype)
        scores.append((dots.relu() * weights.unsqueeze(1)).float().sum(-1).type(q.dtype))
    return torch.cat(scores, 1).float()


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, largest first: [T, W] -> [T, k]. Equal scores: the lowest index wins.

    NaN counts as minus infinity.
    """
    ranked = scores.masked_fill(scores.isnan(), float("-inf"))
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    return order[:, :k]


@op
def select_rows(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The min(k, visible) best candidates of each token, ascending, then -1: [T, W] -> [T, k].

    scores: [T, W] FP32; visible: [T] number of candidates 0 .. visible - 1 that the token may see.
    """
    candidates = torch.arange(scores.shape[1], device=scores.device)
    masked = scores.masked_fill(candidates >= visible.unsqueeze(1), float("-inf"))
    chosen = top_k(masked, k)
    # An unseen candidate can only rank behind every seen one: equal scores fall to the lower index.
    absent = chosen >= visible.unsqueeze(1)
    chosen = chosen.masked_fill(absent, scores.shape[1]).sort(1).values
    return chosen.masked_fill(chosen == scores.shape[1], -1)


@op
def entry_rows(entries: Tensor, table: Tensor, slots: Tensor, page: int) -> Tensor:
    """Rows in which entries of sequences lie, all int64: [T, n] -> [T, n]. -1 stays.

    table: [S, P] pages of each sequence, `page` entries each; slots: [T] whose sequence a token is of.
    """
    pages = table[slots.unsqueeze(1), entries.clamp(min=0) // page]
    return torch.where(entries < 0, -1, pages * page + entries % page)
