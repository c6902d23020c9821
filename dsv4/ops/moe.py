"""Routing and the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops.index import top_k
from dsv4.ops.linear import dense, matmul, quantize_input
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


def route(x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> Route:
    """Choose k experts for each token.

    x: [T, d]; gate: [E, d] FP32. Scores are sqrt(softplus(gate x)) in FP32. A scored layer takes the k largest of
    score + bias (equal: the lowest index wins); a hash layer brings its own choice in `chosen` [T, k]. Either way the
    weights are the scores without bias, divided by their sum, times `scale`.
    """
    scores = softplus(matmul(x, gate)).sqrt()
    experts = top_k(scores if bias is None else scores + bias, k) if chosen is None else chosen
    weights = scores.gather(1, experts)
    return Route(experts, weights / weights.sum(1, keepdim=True) * scale)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) in FP32; the gate has no lower bound. limit 0: no clamp."""
    gate, up = gate.float(), up.float()
    return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) if limit else silu(gate) * up


def expert_forward(x: Tensor, expert: Expert, weight: Tensor | None, limit: float, simulate: bool) -> Tensor:
    """One expert on its tokens. x: [T, d], already rounded as `quantize_input` says; weight: [T, 1] FP32 or None.

    The routing weight multiplies before the second matrix, so that its quantiser sees the weighted value.
    """
    gate = matmul(x, dense(expert.w1)).to(x.dtype)
    up = matmul(x, dense(expert.w3)).to(x.dtype)
    hidden = swiglu(gate, up, limit)
    hidden = (hidden if weight is None else hidden * weight).to(x.dtype)
    return matmul(quantize_input(hidden, expert.w2, simulate), dense(expert.w2)).to(x.dtype)


def moe(x: Tensor, picks: Route, experts: Sequence[Expert], shared: Expert, limit: float, simulate: bool) -> Tensor:
    """Routed experts summed in FP32 in ascending order of their number, then the shared expert. [T, d] -> [T, d]."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    routed = quantize_input(x, experts[0].w1, simulate)
    for number in sorted(set(picks.experts.flatten().tolist())):
        tokens, slots = torch.where(picks.experts == number)
        weight = picks.weights[tokens, slots].unsqueeze(1)
        out[tokens] += expert_forward(routed[tokens], experts[number], weight, limit, simulate).float()
    out += expert_forward(quantize_input(x, shared.w1, simulate), shared, None, limit, simulate).float()
    return out.to(x.dtype)
