"""The experts as a layer holds them on a GPU: stored matrices, all in one place, the shared one beside the routed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops.linear import matmul_rows
from dsv4.ops.moe import Expert, Route, summed, swiglu_quant
from dsv4.ops.op import op
from dsv4.quant.formats import FP8_BLOCK, FP8_BLOCK_F32, FP8_ROW, Format, FormatError
from dsv4.quant.packed import PACKED, Packed, padded, stack, unpack, values
from dsv4.quant.tensor import QTensor

SHARED = (FP8_BLOCK, FP8_BLOCK_F32)  # formats of the shared expert


class Stored(NamedTuple):
    """E experts of width f: up [2 f, d], its rows gate 0, up 0, gate 1, up 1, ... (w1 and w3), and down [d, f] (w2).

    Rows of zeros make down's a multiple of 256.
    """

    up: Packed
    down: Packed


class StoredExperts(NamedTuple):
    """The routed experts, all of one format, and the shared one of the same sizes, which is FP8."""

    routed: Stored
    shared: Stored

    @property
    def many(self) -> int:
        """How many are routed."""
        return len(self.routed.up.tiles)


def store_experts(experts: Sequence[Expert], shared: Expert) -> StoredExperts:
    """Of `PACKED` formats, f and d multiples of 128; the shared expert of FP8. FormatError for others."""
    routed = _stored(experts, PACKED)
    return StoredExperts(routed, _stored([shared], SHARED))


def _stored(experts: Sequence[Expert], formats: tuple[Format, ...]) -> Stored:
    return Stored(
        stack(((_of(one.w1, formats), _of(one.w3, formats)) for one in experts), len(experts)),
        stack(((padded(_of(one.w2, formats)),) for one in experts), len(experts)),
    )


def _of(weight: Tensor | QTensor, formats: tuple[Format, ...]) -> QTensor:
    if not isinstance(weight, QTensor) or weight.format not in formats:
        got = weight.format.name if isinstance(weight, QTensor) else str(weight.dtype)
        raise FormatError("an expert cannot be stored", got=got, wanted=" or ".join(fmt.name for fmt in formats))
    return weight


def stored_expert(experts: StoredExperts, number: int) -> Expert:
    """One of them as it was; the shared one has the number behind the last."""
    from_, at = (experts.shared, 0) if number == experts.many else (experts.routed, number)
    gate, up = unpack(from_.up.matrix(at))
    (down,) = unpack(from_.down.matrix(at))
    rows = gate.shape[1]
    scales = down.scale[: down.format.scale_shape(rows, down.shape[1])[0]]
    return Expert(gate, up, QTensor(down.data[:rows], scales, down.format, down.global_scale))


@op
def stored_moe(x: QTensor, picks: Route, experts: StoredExperts, limit: float, dtype: torch.dtype) -> Tensor:
    """What `moe` makes of stored activations, in the official roundings.

    x: FP8_ROW [T, d]. For token t and each of its experts e, and for the shared one with weight 1, with all products
    summed in FP32 and rounded once to `dtype` (BF16 or FP32):

        g, u = w1 x, w3 x;  h = FP8(silu(min(g, limit)) * clamp(u, -limit, limit) * weight);  y = w2 h

    The result [T, d] is the sum of the y in FP32, by ascending e (of equal ones the first choice first), the shared
    expert's last, rounded to `dtype`. A NaN scale makes a row NaN. Experts that nobody chose are not read.
    """
    chosen, slots = picks.experts.sort(dim=1, stable=True)
    weights, rows = picks.weights.gather(1, slots), x.values()
    y = rows.new_empty(chosen.shape[0], chosen.shape[1] + 1, rows.shape[1])
    for number in chosen.unique().tolist():
        token, place = (chosen == number).nonzero(as_tuple=True)
        up, down = (values(part.matrix(number)) for part in experts.routed)
        y[token, place] = _expert(rows[token], up, down[: rows.shape[1]], weights[token, place], limit, dtype).float()
    up, down = (values(part.matrix(0)) for part in experts.shared)
    y[:, -1] = _expert(rows, up, down[: rows.shape[1]], None, limit, dtype).float()
    return summed(y.unbind(1)).type(dtype)


def _expert(rows: Tensor, up: Tensor, down: Tensor, weight: Tensor | None, limit: float, dtype: torch.dtype) -> Tensor:
    """What one expert makes of the rows that it has."""
    both = matmul_rows(rows, up).type(dtype)
    hidden = swiglu_quant(both[:, ::2].contiguous(), both[:, 1::2].contiguous(), limit, weight, FP8_ROW)
    return matmul_rows(hidden.values(), down).type(dtype)
