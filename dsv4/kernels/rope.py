"""Rotary embedding on a GPU, alone and with the norm of query heads in front of it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.heads import Heads, need_turn, refuse_eights, refuse_heads
from dsv4.kernels.launch import Kernel
from dsv4.kernels.rows import NAMES
from dsv4.ops.rope import Rotation, q_norm_rope, rope

_HEADS: Final = "p l l i i i"  # x, strides of token and head, vectors, heads, D
_ROPE: Final = {t: Kernel("rope.cu", f"rope_{NAMES[t]}", _HEADS + "p p i i p") for t in NAMES}
_Q: Final = {
    (t, v): Kernel("rope.cu", f"q_norm_rope_{NAMES[t]}_{v}", _HEADS + "f p p i p") for t in NAMES for v in (1, 2)
}


def _refuse(x: Tensor, turn: Rotation, inverse: bool = False) -> str | None:
    turned = turn.cos.shape[-1]
    if turned % 2 or turned > x.shape[-1]:
        return f"{turned} of {x.shape[-1]} dimensions are rotated"
    return refuse_heads("x", x, most=2**31 - 1)


@rope.impl("fused", accepts=_refuse)
def _rope(x: Tensor, turn: Rotation, inverse: bool = False) -> Tensor:
    heads, y = Heads.of(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dims = need_turn(turn, x.shape[0], x.device)
    _ROPE[x.dtype](heads.grid, heads.block, x, *heads.arguments, turn.cos, turn.sin, dims, inverse, y, pdl=True)
    return y


def _refuse_q(q: Tensor, eps: float, turn: Rotation) -> str | None:
    return refuse_heads("q", q) or refuse_eights(q.shape[-1], turn)


@q_norm_rope.impl("fused", accepts=_refuse_q)
def norm_heads(q: Tensor, eps: float, turn: Rotation) -> Tensor:
    """`q_norm_rope`, for ops that end with it."""
    heads, y = Heads.of(q), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dims = need_turn(turn, q.shape[0], q.device)
    kernel = _Q[q.dtype, heads.chunks]
    kernel(heads.grid, heads.block, q, *heads.arguments, eps, turn.cos, turn.sin, dims, y, pdl=True)
    return y
