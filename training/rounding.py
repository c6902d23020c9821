"""Rounding that a gradient passes through: what the engine will do to numbers, seen during training.

Forward is the format's own rounding, backward the identity (a straight-through estimate). The scales are those of the
reference's quantisers: powers of two, rounded up. These are written for a compiler that fuses them into their
neighbours; `dsv4/quant` holds the bytes, and a test compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _power_of_two(ratio: Tensor) -> Tensor:
    """2^ceil(log2(ratio)), by the bits: exact at powers of two, where a logarithm may round across."""
    bits = ratio.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()
    return (exponent << 23).view(torch.float32)


def _fp8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _fp4(x: Tensor, scale: Tensor) -> Tensor:
    """To E2M1: steps of 1/2 below 2, of 1 below 4, of 2 up to 6; halves go to the even mantissa."""
    y = x / scale
    step = torch.where(y.abs() < 2, 0.5, torch.where(y.abs() < 4, 1.0, 2.0))
    return torch.round(y / step) * step * scale


def _rows(x: Tensor, block: int, top: float, floor: float) -> tuple[Tensor, Tensor]:
    """Blocks of the last dimension, and the scale of each."""
    blocks = x.float().unflatten(-1, (-1, min(block, x.shape[-1])))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=floor)
    return blocks, _power_of_two(amax * (1 / top))


def fp8_rows(x: Tensor, block: int) -> Tensor:
    """FP8 E4M3 per `block` numbers of the last dimension."""
    blocks, scale = _rows(x, block, 448.0, 1e-4)
    return _fp8(blocks, scale).flatten(-2).type(x.dtype)


def fp4_rows(x: Tensor, block: int = 32) -> Tensor:
    """FP4 E2M1 per `block` numbers of the last dimension."""
    blocks, scale = _rows(x, block, 6.0, 6.0 * 2.0**-126)
    return _fp4(blocks, scale).flatten(-2).type(x.dtype)


def fp8_tiles(w: Tensor, tile: int = 128) -> Tensor:
    """FP8 E4M3 per tile of a matrix [out, in]; sides shorter than a tile, or multiples of it."""
    rows, columns = min(tile, w.shape[0]), min(tile, w.shape[1])
    tiles = w.float().view(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
    scale = _power_of_two(tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-12) * (1 / 448.0))
    return _fp8(tiles, scale).view(w.shape).type(w.dtype)


_KINDS = {"fp8_rows": fp8_rows, "fp4_rows": fp4_rows, "fp8_tiles": fp8_tiles}


def straight(x: Tensor, kind: str, block: int) -> Tensor:
    """x rounded by one of the functions above, with the identity as its gradient. Same shape and dtype.

    The sum is exact: its second term is 0. (As an autograd.Function this lost gradients once compiled for a GPU.)
    """
    return _KINDS[kind](x.detach(), block) + (x - x.detach())
