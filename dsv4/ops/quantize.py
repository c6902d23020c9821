"""Where the model rounds its own cache: FP8 for keys and values, Hadamard and FP4 for index queries and keys."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dsv4.ops.linear import matmul
from dsv4.quant.activation import fp4_simulate, fp8_simulate

KV_BLOCK = 64
INDEX_BLOCK = 32


def quantize_kv(x: Tensor, rope_dims: int) -> Tensor:
    """Round the first D - R dimensions to FP8 per 64 (the last R stay as they are). x: [T, D]; returns the same."""
    return torch.cat((fp8_simulate(x[..., :-rope_dims], KV_BLOCK), x[..., -rope_dims:]), -1)


@lru_cache(maxsize=8)
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


def quantize_index(x: Tensor) -> Tensor:
    """Spread a vector over its dimensions (Hadamard) and round it to FP4 per 32. x: [..., D]; returns the same."""
    return fp4_simulate(hadamard(x), INDEX_BLOCK)
