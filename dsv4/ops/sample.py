"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops.index import top_k
from dsv4.ops.linear import matmul
from dsv4.ops.op import op


class Choice(NamedTuple):
    """What the head says of T tokens, and its k best, the largest first."""

    logits: Tensor  # [T, V] FP32
    values: Tensor  # [T, k] FP32
    ids: Tensor  # [T, k] int64


@op
def head(x: Tensor, weight: Tensor, k: int) -> Choice:
    """Logits, and the min(k, V) largest of each row: the first is the greedy token, the others are what logprobs show.

    x: [T, d]; weight: [V, d], each of any float dtype. Equal logits: the lowest id wins. NaN counts as minus infinity
    (the engine ends a request whose logits are not finite).
    """
    logits = matmul(x, weight)
    ids = top_k(logits, k)
    return Choice(logits, logits.gather(1, ids), ids)


def biased(logits: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    """A copy of logits [V] FP32 with each amount added to its token's, rounded once. Ids are in range, each once."""
    ids = torch.tensor([id for id, _ in bias], dtype=torch.long, device=logits.device)
    amounts = torch.tensor([amount for _, amount in bias], dtype=logits.dtype, device=logits.device)
    out = logits.clone()
    out[ids] += amounts
    return out


def allowed(mask: bytes, logits: Tensor) -> Tensor:
    """Ids [n] int64, ascending, of the tokens of logits [V] that a mask allows: bit i of byte b is token 8 b + i."""
    bits = torch.frombuffer(bytearray(mask), dtype=torch.uint8).to(logits.device)
    each = bits[:, None] & torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=logits.device)
    return each.flatten()[: len(logits)].nonzero().flatten()


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """The distribution that is sampled, and its token ids, most probable first (equal: the lower id first).

    logits: [V] FP32; returns probabilities [n] FP64 that sum to 1 and ids [n]. Filters apply in this order, each to
    what the one before left: temperature; the top_k largest (0: all); those of at least min_p times the largest; the
    shortest head whose mass reaches top_p. The most probable token always stays.
    """
    logits = (logits.double() - logits.max()) / temperature  # the largest is 0: no temperature overflows it
    order = torch.sort(logits, descending=True, stable=True)
    probs, ids = torch.softmax(order.values, 0), order.indices
    keep = probs >= min_p * probs[0]
    if top_k:
        keep[top_k:] = False
    if top_p < 1:
        before = torch.cumsum(probs, 0) - probs
        keep &= before < top_p * probs[keep].sum()
    keep[0] = True
    probs, ids = probs[keep], ids[keep]
    return probs / probs.sum(), ids


def sample(logits: Tensor, u: float, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> int:
    """One token id from logits [V], by the uniform number u in [0, 1).

    temperature 0 takes the largest, the lowest id of equals; the filters are those of `probabilities`.
    """
    if temperature == 0:
        return int(torch.argmax((logits == logits.max()).int()))
    probs, ids = probabilities(logits, temperature, top_k, top_p, min_p)
    at = int(torch.searchsorted(torch.cumsum(probs, 0), u, right=True))
    return int(ids[min(at, len(ids) - 1)])
