"""The router on a GPU: its product, and behind it scores, choice and weights."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.matmul import product, refuse_product
from dsv4.kernels.rows import need_vector
from dsv4.ops.moe import Route, route

_WARPS: Final = 4  # of a block, a token each
_LANES: Final = 32  # that hold the choices, and as many experts at a time
_SIZES: Final = (8, 12, 16)  # experts of a lane
_KERNELS: Final = {m: Kernel("route.cu", f"route_{m}", "p p p f p p i i i") for m in _SIZES}


def _refuse(x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> str | None:
    experts = gate.shape[0]
    if not 0 < k <= min(_LANES, experts) or experts > _LANES * _SIZES[-1]:
        return f"{k} of {experts} experts: wanted 1 to {_LANES} of at most {_LANES * _SIZES[-1]}"
    return refuse_product(x, gate)


@route.impl("fused", accepts=_refuse)
def _route(x: Tensor, gate: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> Route:
    tokens, count = x.shape[0], gate.shape[0]
    if bias is not None:
        need_vector(bias, "bias", count, x.device)
    if chosen is not None:
        need(chosen, "chosen", shape=(tokens, k), dtype=torch.int64, device=x.device)
    logits = product(x, gate)
    experts = torch.empty(tokens, k, dtype=torch.int64, device=x.device)
    weights = torch.empty(tokens, k, device=x.device)
    kernel = _KERNELS[next(m for m in _SIZES if _LANES * m >= count)]
    kernel(-(-tokens // _WARPS), 128, logits, bias, chosen, scale, experts, weights, tokens, count, k, pdl=True)
    return Route(experts, weights)
