"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.ops.index import top_k
from dsv4.ops.linear import matmul
from dsv4.ops.op import op

GAMMA: Final = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: SplitMix64's step from a number to the next
_MIXED: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # its shifts and factors; a shift of 31 follows
_COLDEST: Final = 1e-200  # differences of FP32 logits divided by less could only overflow


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


class Sampled(NamedTuple):
    """Of T rows of logits."""

    tokens: Tensor  # [T] int64
    marks: Tensor  # [T] int64, what depends on all bits of a row and on no order of adding
    finite: Tensor  # [T] bool, whether all logits of a row are


@op
def sample(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Sampled:
    """A token of each row, drawn as softmax(logits / temperature) has it: the largest of logit / temperature + noise.

    logits: [T, V] FP32; temperatures: [T] FP64, 0 takes the largest logit; keys: [T] int64, of which the row's noise is
    a function (`noise`), so that neither other rows nor the order of a sum can change a token. Equals: the lowest id
    wins. NaN counts as minus infinity. The noise is Gumbel's, for which this is exact (Gumbel 1954; Maddison et al.,
    arXiv 1411.0030): no probability is computed and nothing is sorted.

    marks: the sum over i of bits_i (2 i + 1) GAMMA modulo 2^64, bits_i of a logit as a signed integer. An odd factor
    loses nothing, so that no change of a single logit goes unseen.
    """
    scores = logits.masked_fill(logits.isnan(), -torch.inf).double()
    warm = temperatures > 0
    scores[warm] /= temperatures[warm].clamp(min=_COLDEST).unsqueeze(1)
    scores[warm] += noise(keys[warm], logits.shape[1])
    tokens = (scores == scores.amax(1, keepdim=True)).int().argmax(1)
    odd = torch.arange(1, 2 * logits.shape[1], 2, device=logits.device) * _signed(GAMMA)
    marks = (logits.contiguous().view(torch.int32) * odd).sum(1)
    return Sampled(tokens, marks, logits.isfinite().all(1))


def noise(keys: Tensor, count: int) -> Tensor:
    """Numbers of Gumbel's distribution, [T, count] FP64, from keys [T] int64.

    Number i of a key is -log(-log(u)), u the middle of the 2^-52 that the upper bits of `mixed(key + (i + 1) GAMMA)`
    name: SplitMix64 (Steele, Lea and Flood 2014) with the key as its seed.
    """
    counted = keys.unsqueeze(1) + torch.arange(1, count + 1, device=keys.device) * _signed(GAMMA)
    bits = _shifted(mixed(counted), 12).double()
    return -torch.log(-torch.log((bits + 0.5) * 2.0**-52))


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's function of 64 bits, int64 to int64: each bit depends on all."""
    for shift, factor in _MIXED:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def key_of(seed: int, position: int) -> int:
    """The key of the token at a position of a request with this seed: any whole numbers, a signed one of 64 bits."""
    return _signed(_mixed(_mixed(seed) + position * GAMMA))


def _mixed(x: int) -> int:
    """`mixed` of one number, without a sign."""
    x &= 2**64 - 1
    for shift, factor in _MIXED:
        x = (x ^ (x >> shift)) * factor & (2**64 - 1)
    return x ^ (x >> 31)


def _shifted(x: Tensor, count: int) -> Tensor:
    """To the right, with zeros."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def biased(logits: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    """A copy of logits [V] FP32 with each amount added to its token's, rounded once. Ids are in range, each once."""
    ids = torch.tensor([id for id, _ in bias], dtype=torch.long, device=logits.device)
    amounts = torch.tensor([amount for _, amount in bias], dtype=logits.dtype, device=logits.device)
    out = logits.clone()
    out[ids] += amounts
    return out


def allowed(masks: Tensor, count: int) -> Tensor:
    """Which of the tokens 0 .. count - 1 masks allow, bool [n, count]: bit i of byte b is token 8 b + i.

    masks: uint8 [n, m], 8 m at least `count`.
    """
    bits = torch.arange(8, dtype=torch.uint8, device=masks.device)
    return ((masks.unsqueeze(2) >> bits) & 1).flatten(1)[:, :count].bool()


def filtered(logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """A copy of logits [T, V] FP32 in which minus infinity stands for what a row's filters leave out.

    temperatures, top_p and min_p: [T] FP64, the first above 0; top_k: [T] int64. The filters apply in this order, each
    to what the one before left: the top_k largest (0: all); those of at least min_p times the largest probability; the
    shortest head whose mass reaches top_p. Equal logits: the lower id is the larger one. The largest always stays.
    """
    order = torch.sort(logits.masked_fill(logits.isnan(), -torch.inf), dim=1, descending=True, stable=True)
    below = order.values.double() - order.values[:, :1].double()
    weights = (below / temperatures.clamp(min=_COLDEST).unsqueeze(1)).exp()
    places = torch.arange(logits.shape[1], device=logits.device)
    keep = weights >= min_p.unsqueeze(1)  # the largest is 1
    keep &= (top_k == 0).unsqueeze(1) | (places < top_k.unsqueeze(1))
    mass = weights * keep
    keep &= (top_p >= 1).unsqueeze(1) | (mass.cumsum(1) - mass < top_p.unsqueeze(1) * mass.sum(1, keepdim=True))
    keep[:, 0] = True
    return logits.masked_fill(~torch.empty_like(keep).scatter_(1, order.indices, keep), -torch.inf)
