"""Rounding: FP8 for keys and values, Hadamard and FP4 for index vectors, stored rows for quantised matrices."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dsv4.ops.linear import matmul
from dsv4.ops.op import op
from dsv4.quant.formats import Format
from dsv4.quant.rounding import FP4, FP8_KV, Rounding, none
from dsv4.quant.rows import GlobalScale, encode_rows
from dsv4.quant.tensor import QTensor


@op
def quantize(x: Tensor, fmt: Format, scale: GlobalScale = None) -> QTensor:
    """What a quantised matrix reads of x, in bytes.

    x: [T, n] BF16 or FP32; fmt: FP8_ROW (E4M3 per 128), MXFP4 (E2M1 per 32) or NVFP4 (E2M1 per 16, its global `scale`
    as in `encode_rows`). A block that is not finite is stored as NaN, confined to itself.
    """
    return encode_rows(x, fmt, scale)


@op
def quantize_kv(x: Tensor, rope_dims: int, rounding: Rounding = FP8_KV) -> Tensor:
    """Round the first D - R dimensions (the last R stay as they are). x: [T, D]; returns the same."""
    if rounding is none:
        return x
    return torch.cat((rounding(x[..., :-rope_dims]), x[..., -rope_dims:]), -1)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # training may need it later
def _hadamard_matrix(n: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.mul(matrix, n**-0.5)


def hadamard(x: Tensor) -> Tensor:
    """Multiply by the orthonormal Hadamard matrix in Sylvester's order, FP32 inside.

    x: [..., D], D a power of two; returns its shape and dtype.
    """
    dims = x.shape[-1]
    return matmul(x.reshape(-1, dims), _hadamard_matrix(dims, x.device)).type(x.dtype).view(x.shape)


@op
def quantize_index(x: Tensor, rounding: Rounding = FP4) -> Tensor:
    """Spread a vector over its dimensions (Hadamard) and round it. x: [..., D]; returns the same.

    Where nothing is rounded nothing is spread: between queries and keys the Hadamard matrix cancels.
    """
    return x if rounding is none else rounding(hadamard(x))
