"""The routed experts as a layer holds them on a GPU: stored matrices, all in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops.linear import matmul_rows
from dsv4.ops.moe import Expert, Route, summed, swiglu_quant
from dsv4.ops.op import op
from dsv4.quant.formats import FP8_ROW, MXFP4, FormatError
from dsv4.quant.packed import Packed, stack, unpack
from dsv4.quant.tensor import QTensor


class StoredExperts(NamedTuple):
    """E experts of width f: up [2 f, d], its rows gate 0, up 0, gate 1, up 1, ... (w1 and w3), and down [d, f] (w2)."""

    up: Packed
    down: Packed


def store_experts(experts: Sequence[Expert]) -> StoredExperts:
    """MXFP4 matrices, f a multiple of 128 and d of 256. FormatError for others."""
    return StoredExperts(
        stack((_interleaved(one) for one in experts), len(experts)),
        stack((_mxfp4(one.w2) for one in experts), len(experts)),
    )


def stored_expert(experts: StoredExperts, number: int) -> Expert:
    """One of them as it was."""
    both, down = (unpack(part.matrix(number)) for part in experts)
    gate, up = (QTensor(both.data[first::2], both.scale[first::2], MXFP4) for first in (0, 1))
    return Expert(gate, up, down)


def _mxfp4(weight: Tensor | QTensor) -> QTensor:
    if not isinstance(weight, QTensor) or weight.format is not MXFP4:
        got = weight.format.name if isinstance(weight, QTensor) else str(weight.dtype)
        raise FormatError("an expert cannot be stored", got=got, wanted=MXFP4.name)
    return weight


def _interleaved(one: Expert) -> QTensor:
    w1, w3 = _mxfp4(one.w1), _mxfp4(one.w3)
    data, scale = (torch.stack(pair, 1).flatten(0, 1) for pair in ((w1.data, w3.data), (w1.scale, w3.scale)))
    return QTensor(data, scale, MXFP4)


@op
def routed_experts(x: QTensor, picks: Route, experts: StoredExperts, beside: Tensor, limit: float) -> Tensor:
    """What `moe` makes of stored activations, in the official roundings, where the shared expert has run already.

    x: FP8_ROW [T, d]; beside: [T, d], what the shared expert gave, BF16 or FP32. For token t and each of its experts e,
    with all products summed in FP32 and rounded once to the dtype of `beside`:

        g, u = w1 x, w3 x;  h = FP8(silu(min(g, limit)) * clamp(u, -limit, limit) * weight);  y = w2 h

    The result [T, d] is the sum of the y in FP32, by ascending e (of equal ones the first choice first), then `beside`,
    rounded to its dtype. A NaN scale makes a row NaN. Experts that nobody chose are not read.
    """
    each = _each(x, picks, experts, beside.dtype, limit).float()
    return summed((*each.unbind(1), beside.float())).type(beside.dtype)


def _each(x: QTensor, picks: Route, experts: StoredExperts, dtype: torch.dtype, limit: float) -> Tensor:
    """The results of all pairs of token and expert, by ascending expert: [T, k, d]."""
    chosen, slots = picks.experts.sort(dim=1, stable=True)
    weights, rows = picks.weights.gather(1, slots), x.values()
    found = rows.new_empty(*chosen.shape, rows.shape[1], dtype=dtype)
    for number in chosen.unique().tolist():
        token, place = (chosen == number).nonzero(as_tuple=True)
        up, down = (unpack(part.matrix(number)).values() for part in experts)
        both = matmul_rows(rows[token], up).type(dtype)
        gate, up = both[:, ::2].contiguous(), both[:, 1::2].contiguous()
        hidden = swiglu_quant(gate, up, limit, weights[token, place], FP8_ROW)
        found[token, place] = matmul_rows(hidden.values(), down).type(dtype)
    return found
