"""Matrix products whose rows do not depend on their company."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.ops.op import op
from dsv4.quant.rounding import Rounding
from dsv4.quant.tensor import QTensor


def widen(x: Tensor) -> Tensor:
    """x as FP32. A cast that changes nothing still costs a call: small steps are made of thousands."""
    return x if x.dtype == torch.float32 else x.float()


@op
def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in FP32, every row a product of its own.

    x: [T, K] any float dtype; weight: [N, K] any float dtype; returns [T, N] FP32. A library GEMM picks its kernel by
    the number of rows, and with it the order of every row's sum. On the CPU this runs as T products of one row, so
    that a token's bits are the same alone, in a batch and in any chunk.
    """
    return matmul_rows(x, weight)


def matmul_rows(x: Tensor, weight: Tensor) -> Tensor:
    """The body of `matmul`, for ops that stand for themselves."""
    x, weight = widen(x), widen(weight)
    rows = x.shape[0]
    if rows == 1 or x.is_cuda:
        return F.linear(x, weight)
    if weight.numel() < 400:  # below this size the library multiplies batches by a loop of its own, in another order
        return torch.cat([F.linear(row, weight) for row in x.split(1)]) if rows else x.new_empty(0, weight.shape[0])
    return torch.bmm(x.unsqueeze(1), weight.t().expand(rows, -1, -1)).squeeze(1)


def dense(weight: Tensor | QTensor) -> Tensor:
    """The matrix as `matmul` reads it, [N, K]: quantised: decoded to FP32 (once, then kept)."""
    return weight.values() if isinstance(weight, QTensor) else weight


def quantize_input(x: Tensor, weight: Tensor | QTensor, rounding: Rounding) -> Tensor:
    """What the product with `weight` reads of `x`: rounded if the weight is quantised.

    x: [T, K]; returns the same shape and dtype (officially the reference kernel's `act_quant`). One call serves
    all matrices that share an input.
    """
    return rounding(x) if isinstance(weight, QTensor) else x


@op
def project(x: Tensor, weight: Tensor | QTensor) -> Tensor:
    """The product of an input that `quantize_input` has seen, rounded once to its dtype: [T, K] -> [T, N]."""
    return matmul(x, dense(weight)).type(x.dtype)


@op
def linear(x: Tensor, weight: Tensor | QTensor, rounding: Rounding) -> Tensor:
    """A linear layer without bias, accumulated in FP32 and rounded once to the dtype of `x`.

    x: [T, K]; weight: [N, K] dense or quantised; returns [T, N] in x.dtype. A quantised weight meets rounded
    activations: officially FP8 (E4M3 per 128, power-of-two scales), as in the reference's `fp8_gemm` and `fp4_gemm`.
    Because those scales are powers of two, one FP32 product of the decoded operands equals the scaled block sums up to
    their order.
    """
    return project(quantize_input(x, weight, rounding), weight)


@op
def scaled_matmul(x: QTensor, weight: QTensor, dtype: torch.dtype) -> Tensor:
    """The product of stored activations with a stored matrix: what a linear layer is once its input is quantised.

    x: [T, K] rows, weight: [N, K] -> [T, N] in `dtype` (BF16 or FP32), summed in FP32 and rounded once. The reference's
    `fp8_gemm`. A NaN scale of a row makes all of the row NaN.
    """
    return matmul_rows(x.values(), dense(weight)).type(dtype)


class Products(NamedTuple):
    """What two matrices make of one input."""

    dense: Tensor  # [T, N] FP32
    stored: Tensor  # [T, M]


@op
def shared_input(x: Tensor, rows: QTensor, dense: Tensor, stored: QTensor) -> Products:
    """The products of one input with all matrices that read it, those of a kind one below another.

    x: [T, K], and `rows`, the same as it is stored; dense: [N, K] reads x (of a compressor, of the indexer's, and the
    weights of its heads), stored: [M, K] reads `rows` (wq_a and wkv). As `matmul`, and as `scaled_matmul` in x.dtype.
    """
    return Products(matmul(x, dense), scaled_matmul(rows, stored, x.dtype))


@op
def grouped_scaled_matmul(x: QTensor, weight: QTensor, groups: int, dtype: torch.dtype) -> Tensor:
    """The product of each group of a token's columns with a matrix of its own, on stored activations.

    x: [T, G * K] rows; weight: [G * R, K], its row block g belongs to columns g K .. (g + 1) K - 1. Returns [T, G * R]
    in `dtype`, each number as `scaled_matmul` has it. Serving stacks run the first half of the output projection so.
    """
    parts = x.values().split(weight.shape[1], 1)
    return torch.cat([matmul_rows(*pair) for pair in zip(parts, dense(weight).chunk(groups), strict=True)], 1).type(
        dtype
    )


@op
def grouped_linear(x: Tensor, weight: Tensor | QTensor) -> Tensor:
    """The first half of the output projection: each group of heads has a matrix of its own.

    x: [T, G, K] (the heads of a group concatenated); weight: [G * R, K], row block g belongs to group g; returns
    [T, G * R] in x.dtype. The reference runs this product in BF16 on activations that nothing has rounded, and widens
    a quantised weight.
    """
    groups = x.shape[1]
    blocks = dense(weight).view(groups, -1, weight.shape[1])
    return torch.cat([matmul(x[:, g], blocks[g]) for g in range(groups)], dim=1).type(x.dtype)
