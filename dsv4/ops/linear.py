"""Matrix products whose rows do not depend on their company."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.quant.activation import fp8_simulate
from dsv4.quant.tensor import QTensor

# A library GEMM picks its kernel by the number of rows, and with it the order of every row's sum. All products here
# run on tiles of exactly this many rows, so that a token's bits are the same alone, in a batch and in any chunk.
ROW_TILE = 8
ACTIVATION_BLOCK = 128


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in FP32 over fixed row tiles.

    x: [T, K] any float dtype; weight: [N, K] any float dtype; returns [T, N] FP32. The last tile is padded with
    zero rows. On the CPU a row of the result depends on nothing but that row of `x` and `weight`.
    """
    rows, width = x.shape
    x, weight = x.float(), weight.float()
    if x.is_cuda:
        return F.linear(x, weight)
    tiles = -(-rows // ROW_TILE)
    if rows != tiles * ROW_TILE:
        x = F.pad(x, (0, 0, 0, tiles * ROW_TILE - rows))
    if tiles == 1:
        return F.linear(x, weight)[:rows]
    tiled = torch.bmm(x.view(tiles, ROW_TILE, width), weight.t().expand(tiles, width, weight.shape[0]))
    return tiled.view(tiles * ROW_TILE, -1)[:rows]


def dense(weight: Tensor | QTensor) -> Tensor:
    """The matrix as [N, K] FP32: a quantised one decoded (once, then kept), any other widened."""
    return weight.values() if isinstance(weight, QTensor) else weight.float()


def quantize_input(x: Tensor, weight: Tensor | QTensor, simulate: bool) -> Tensor:
    """What the product with `weight` reads of `x`: rounded to FP8 per 128 if the weight is quantised and `simulate`.

    x: [T, K]; returns the same shape and dtype (section 6.1 of the reference kernel's `act_quant`). One call serves
    all matrices that share an input.
    """
    return fp8_simulate(x, ACTIVATION_BLOCK) if simulate and isinstance(weight, QTensor) else x


def linear(x: Tensor, weight: Tensor | QTensor, simulate: bool) -> Tensor:
    """A linear layer without bias, accumulated in FP32 and rounded once to the dtype of `x`.

    x: [T, K]; weight: [N, K] dense or quantised; returns [T, N] in x.dtype. With `simulate`, a quantised weight meets
    FP8 activations (E4M3 per 128, power-of-two scales), as the reference's `fp8_gemm` and `fp4_gemm` do. Because those
    scales are powers of two, one FP32 product of the decoded operands equals the scaled block sums up to their order.
    """
    return matmul(quantize_input(x, weight, simulate), dense(weight)).to(x.dtype)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The first half of the output projection: each group of heads has a matrix of its own.

    x: [T, G, K] (the heads of a group concatenated); weight: [G * R, K], row block g belongs to group g; returns
    [T, G * R] in x.dtype. Activations are not quantised here: the reference runs this product in BF16.
    """
    groups = x.shape[1]
    blocks = weight.view(groups, -1, weight.shape[1])
    return torch.cat([matmul(x[:, g], blocks[g]) for g in range(groups)], dim=1).to(x.dtype)
