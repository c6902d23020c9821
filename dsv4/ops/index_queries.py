"""The indexer's queries in bytes, as keys are, with the weights of its heads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dsv4.ops.op import op
from dsv4.ops.quantize import hadamard
from dsv4.ops.rope import Rotation, rope
from dsv4.quant.index_keys import KeyLayout


class IndexQueries(NamedTuple):
    """What `index_logits` reads of T tokens."""

    data: Tensor  # uint8 [T, H, data_bytes of the layout]
    scales: Tensor  # uint8 [T, H, 4]
    weights: Tensor  # [T, H] FP32


@op
def index_queries(q: Tensor, turn: Rotation, logits: Tensor, layout: KeyLayout, spread: bool = True) -> IndexQueries:
    """Rotate, spread and store the heads of a query; scale their weights.

    q: [T, H, 128] as wq_b left it; turn: rotations of the T positions; logits: [T, H] FP32, the product with
    weights_proj. spread: by a Hadamard matrix, as the keys were. Weights are rounded to q's dtype before and after the
    scale of scores and heads, (128 * H)^-1/2, comes to them, as `head_weights` has it.
    """
    turned = rope(q, turn)
    data, scales = layout.encode(hadamard(turned) if spread else turned)
    _, heads, dim = q.shape
    return IndexQueries(data, scales, (logits.type(q.dtype) * (dim * heads) ** -0.5).float())
