"""Query heads straight from their matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.linear import scaled_matmul
from dsv4.ops.op import op
from dsv4.ops.rope import Rotation, q_norm_rope
from dsv4.quant.tensor import QTensor


@op
def scaled_matmul_q_norm_rope(
    x: QTensor, weight: QTensor, heads: int, eps: float, turn: Rotation, dtype: torch.dtype
) -> Tensor:
    """The second half of the query projection: a product, cut into heads, each normalised by itself and rotated.

    x: [T, K] rows; weight: [H * D, K]; turn: rotations of the T positions. Returns [T, H, D] in `dtype` (BF16 or FP32),
    to which the product is rounded before its norm, as `scaled_matmul` has it.
    """
    q = scaled_matmul(x, weight, dtype).view(x.shape[0], heads, weight.shape[0] // heads)
    return q_norm_rope(q, eps, turn)
