"""Routing and the experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.ops.index import top_k
from dsv4.ops.linear import matmul, project, quantize_input
from dsv4.ops.op import op
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import Format
from dsv4.quant.rounding import Numerics
from dsv4.quant.rows import GlobalScale
from dsv4.quant.tensor import QTensor


class Expert(NamedTuple):
    """One SwiGLU expert: gate and up [f, d], down [d, f], dense or quantised."""

    w1: Tensor | QTensor
    w3: Tensor | QTensor
    w2: Tensor | QTensor


class Route(NamedTuple):
    """Chosen experts of each token and their weights."""

    experts: Tensor  # [T, k] int64
    weights: Tensor  # [T, k] FP32


def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x), and x itself above 20."""
    return torch.where(x > 20, x, torch.log1p(torch.exp(x)))


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x). Spelt out for the same reason as `mhc.sigmoid`."""
    return x / (1 + torch.exp(-x))


@op
def route(x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> Route:
    """Choose k experts for each token.

    x: [T, d]; gate: [E, d], any float dtypes. Scores are sqrt(softplus(gate x)) in FP32. A scored layer takes the k
    largest of score + bias (equal: the lowest index wins); a hash layer brings its choice in `chosen` [T, k]. Weights
    are the scores without bias, divided by their sum, times `scale`. NaN counts as minus infinity in a choice.
    """
    scores = softplus(matmul(x, gate)).sqrt()
    experts = top_k(scores if bias is None else scores + bias, k) if chosen is None else chosen
    weights = scores.gather(1, experts)
    return Route(experts, weights / weights.sum(1, keepdim=True) * scale)


@op
def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) in FP32; the gate has no lower bound. limit 0: no clamp."""
    gate, up = gate.float(), up.float()
    return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) if limit else silu(gate) * up


@op
def swiglu_quant(
    gate: Tensor, up: Tensor, limit: float, weight: Tensor | None, fmt: Format, scale: GlobalScale = None
) -> QTensor:
    """What an expert's second matrix reads, in bytes: `swiglu` times the routing weight, rounded to the input's dtype.

    gate, up: [T, f]; weight: [T] FP32, None for 1. It comes before the quantiser, which so sees the product.
    """
    hidden = swiglu(gate, up, limit)
    hidden = hidden if weight is None else hidden * weight.unsqueeze(1)
    return quantize(hidden.type(gate.dtype), fmt, scale)


@op
def moe(x: Tensor, picks: Route, experts: Sequence[Expert], shared: Expert, limit: float, rounds: Numerics) -> Tensor:
    """Routed experts and the shared one, summed in FP32: routed by ascending number, shared last. [T, d] -> [T, d].

    The routing weight multiplies before the second matrix, so that its quantiser sees the weighted value. Everything
    between the matrices runs once over all pairs of token and expert. `rounds` says what the quantised matrices read.
    """
    tokens, k = picks.experts.shape
    chosen, slots = picks.experts.sort(1)
    # The shared expert follows as number E with weight 1. Numbers of all pairs of token and expert, token by token:
    numbers = F.pad(chosen, (0, 1), value=len(experts)).flatten().tolist()
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    parts = [(shared if e == len(experts) else experts[e], n) for e, n in sorted(Counter(numbers).items())]
    at = torch.tensor([order, [n // (k + 1) for n in order]], device=x.device)
    # All first matrices are quantised or none is: the shared expert's stands for them.
    rounded = _expert_input(x, shared, rounds, at[1])
    weight = F.pad(picks.weights.gather(1, slots), (0, 1), value=1.0).view(-1, 1)[at[0]]
    gate, up = (_by_expert(rounded, [(part[which], n) for part, n in parts]) for which in (0, 1))
    hidden = (swiglu(gate, up, limit) * weight).type(x.dtype)
    down = _by_expert(_expert_hidden(hidden, shared, rounds, tokens), [(part.w2, n) for part, n in parts])
    y = torch.empty_like(down).index_copy_(0, at[0], down).view(tokens, k + 1, -1).float()
    return summed(y.unbind(1)).type(x.dtype)


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, one after another."""
    out, *others = parts
    for other in others:
        out = out + other
    return out


def _expert_input(x: Tensor, shared: Expert, rounds: Numerics, rows: Tensor) -> Tensor:
    """The rounded rows of x [T, d] that the pairs of token and expert read: [P, d], the last T the shared expert's."""
    routed = quantize_input(x, shared.w1, rounds.expert_input)
    if rounds.shared_input is rounds.expert_input:  # one rounding serves them all
        return routed[rows]
    own = quantize_input(x, shared.w1, rounds.shared_input)
    first, last = rows.split((len(rows) - len(x), len(x)))
    return torch.cat((routed[first], own[last]))


def _expert_hidden(hidden: Tensor, shared: Expert, rounds: Numerics, tokens: int) -> Tensor:
    """What the second matrices read of [P, f], the last T rows the shared expert's."""
    if rounds.shared_hidden is rounds.expert_hidden:
        return quantize_input(hidden, shared.w2, rounds.shared_hidden)
    routed, own = hidden.split((len(hidden) - tokens, tokens))
    rounded = quantize_input(routed, shared.w2, rounds.expert_hidden)
    return torch.cat((rounded, quantize_input(own, shared.w2, rounds.shared_hidden)))


def _by_expert(x: Tensor, parts: Sequence[tuple[Tensor | QTensor, int]]) -> Tensor:
    """Consecutive rows of x, each run through its own matrix."""
    runs = x.split_with_sizes([count for _, count in parts])
    return torch.cat([project(rows, weight) for rows, (weight, _) in zip(runs, parts, strict=True)])
