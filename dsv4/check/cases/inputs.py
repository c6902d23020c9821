"""What the cases are made of: numbers that depend on a name alone, and numbers at the edges of a format."""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor

from dsv4.quant import e2m1, e4m3

BF16, FP32 = torch.bfloat16, torch.float32
NAN, INF = float("nan"), float("inf")
FLASH, PRO = 4096, 7168
BIG = 65_537  # tokens: more than a grid's y holds
MANY = 8192  # tokens of a timed prefill


def normal(name: str, *shape: int, dtype: torch.dtype = FP32, size: float = 1.0) -> Tensor:
    """Normal numbers that depend on name and shape, made on the CPU. Of many rows the first thousand repeat."""
    rows = min(shape[0], 1000)
    draw = torch.Generator().manual_seed(crc32(f"{name}{shape[1:]}".encode()))
    made = (size * torch.randn((rows, *shape[1:]), generator=draw)).to(dtype)
    return made if rows == shape[0] else made.repeat((-(-shape[0] // rows), *(1 for _ in shape[1:])))[: shape[0]]


def norm_weight(size: int) -> Tensor:
    """Of a norm: about 1, some of them negative."""
    weight = 1 + 0.2 * normal("norm weight", size)
    weight[::7] *= -1
    return weight


def padded(x: Tensor, more: int = 8) -> Tensor:
    """The same numbers in rows that are `more` numbers apart."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + more), NAN)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def sparse(x: Tensor) -> Tensor:
    """The same numbers, every other one in memory."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), NAN)
    wide[..., ::2] = x
    return wide[..., ::2]


def midpoints(values: Tensor) -> Tensor:
    """Halfway between neighbours: the ties of a format with these values, with one sign and the other; then the top."""
    ties = torch.cat(((values[1:] + values[:-1]) / 2, values[-1:]))
    ties[1::2] *= -1
    return ties


def e4m3_values() -> Tensor:
    """0 to 448, FP32."""
    return e4m3.e4m3_decode(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn))


def e2m1_values() -> Tensor:
    """0 to 6, FP32."""
    return torch.tensor(e2m1.VALUES)


def edges(values: Tensor, block: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[14, columns]: rows at the edges of a format with these values and blocks of so many.

    Ties under scale 1, the same with two numbers less than the top, zeros, minus zeros, subnormals, less than every
    floor, about a floor, the top at every power of two, one step above it, huge numbers, one NaN, one infinity,
    alternating signs of one size, and normal numbers whose blocks differ by a million.
    """
    top, n = float(values[-1]), torch.arange(columns)
    ties = midpoints(values)
    ties = torch.cat((ties, -ties))[torch.arange(columns) % (2 * len(ties))]
    ties[::block] = top
    base = normal("edges", columns)
    broken, infinite = base.clone(), base.clone()
    broken[columns // 2], infinite[columns // 3] = NAN, -INF
    power = 2.0 ** ((n // block) % 21 - 10).float()
    above = 1 + 2.0**-7
    rows = (
        ties,
        ties[(n + block // 2) % columns].clamp(-values[-3], values[-3]),
        torch.zeros(columns),
        -torch.zeros(columns),
        base * 2.0**-130,
        base * 1e-12,
        base * 1e-4,
        torch.where(n % block == 1, top, 0.3) * power,
        torch.where(n % block == 1, top * above, 0.3) * power,
        base * 2.0**100,
        broken,
        infinite,
        torch.where(n % 2 == 0, 0.7, -0.7),
        base * 10.0 ** ((n // block) % 7 - 3).float(),
    )
    return torch.stack(rows).to(dtype)
