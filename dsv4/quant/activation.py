"""The model's activation quantisers: FP8 and FP4 with power-of-two scales rounded up (the reference's kernel.py).

For one block of the last dimension, with (top, floor) = (448, 1e-4) for FP8 and (6, 6 * 2^-126) for FP4:

    amax = max(|x|, floor);  s = 2^ceil(log2(amax * fp32(1/top)));  q = round(x / s);  simulated x' = q * s

`ceil(log2(.))` reads the bits: the exponent, and one more if any mantissa bit is set. Rounding is to nearest even.

These run dozens of times for a decoded token on a few hundred numbers, where an op costs more than its arithmetic.
So a simulation never visits the narrow format: since s is a power of two, q * s is x rounded to a step that is a power
of two as well, which one addition does (see `_round`). Nothing but `max` ever reads two values, so the bits of a row
do not depend on its company.

Numbers that are not finite: NaN and Inf give NaN at their own place and leave the rest of their block unspecified
(its scale is huge). Magnitudes from 2^106 up in FP32 and from 2^122 up in BF16 may overflow in the addition and come
out as NaN or Inf, never as another number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from dsv4.quant import e2m1
from dsv4.quant.e8m0 import ue8m0_encode_ceil


class _Rule(NamedTuple):
    """How one narrow format is rounded to, in the arithmetic of one dtype. Tensors are 0-dim, in the integer dtype."""

    integer: torch.dtype
    exponent: torch.Tensor  # mask of the exponent field
    carry: torch.Tensor  # added to the bits of amax: exponent of s times the smallest normal number, after the mask
    floor: float  # least amax
    magic: float  # 1.5 * 2^(fraction bits) steps, for a binade of 1
    normal: float  # smallest normal number of the narrow format


def _rule(dtype: torch.dtype, top: float, fraction: int, normal_exponent: int, floor: float) -> _Rule:
    """The rule for a format whose largest number is `top` and whose mantissa has `fraction` bits.

    s is the binade of amax over the binade of `top`, doubled where amax has a larger mantissa than `top`: adding
    `keep` to the bits of amax carries into the exponent just there. That equals the definition, because the FP32
    product with fp32(1/top) exceeds a power of two just where amax exceeds `top` times it (tested on every mantissa).
    """
    integer, bits = (torch.int16, 7) if dtype == torch.bfloat16 else (torch.int32, 23)
    mantissa, exponent = math.frexp(top)  # mantissa in [1/2, 1)
    keep = int((2 - 2 * mantissa) * 2**bits) - 1
    carry = torch.tensor(keep + ((normal_exponent - exponent + 1) << bits), dtype=integer)
    infinity = torch.tensor(math.inf, dtype=dtype).view(integer)
    return _Rule(integer, infinity, carry, floor, 1.5 * 2.0 ** (bits - fraction), 2.0**normal_exponent)


_DTYPES = (torch.bfloat16, torch.float32)
# The floor of amax is 448 * 2^-22, which has the same scale 2^-22 as the definition's 1e-4 and is exact in BF16.
_FP8 = {dtype: _rule(dtype, 448.0, 3, -6, 448.0 * 2.0**-22) for dtype in _DTYPES}
_FP4 = {dtype: _rule(dtype, 6.0, 1, 0, 6.0 * 2.0**-126) for dtype in _DTYPES}


def _round(x: torch.Tensor, rule: _Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """One block [..., n] -> (rounded [..., n], s * smallest normal as integer bits [..., 1]).

    The step of the narrow format at x is 2^-fraction times the binade of x, or of the smallest normal number below
    that. x + 1.5 * 2^bits steps has no bits under a step, so the addition itself rounds to nearest even, and the
    subtraction is exact. `alpha` multiplies inside the same op, exactly.
    """
    least = x.abs().amax(-1, keepdim=True).clamp_min_(rule.floor).view(rule.integer)
    least.add_(rule.carry).bitwise_and_(rule.exponent)
    binade = torch.maximum(x.view(rule.integer).bitwise_and(rule.exponent), least).view(x.dtype)
    rounded = torch.add(x, binade, alpha=rule.magic).sub_(binade, alpha=rule.magic)
    return rounded.copysign_(x), least  # a negative number that rounds to zero is -0


def blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """[..., n] -> [..., ceil(n / block), block]; a short last block is filled with zeros, which change no maximum."""
    if x.shape[-1] % block:
        x = pad(x, (0, -x.shape[-1] % block))
    return x.view(*x.shape[:-1], x.shape[-1] // block, block)


def _simulate(x: torch.Tensor, block: int, rule: _Rule) -> torch.Tensor:
    if x.shape[-1] <= block:
        return _round(x, rule)[0]
    rounded = _round(blocks(x, block), rule)[0]
    return rounded.flatten(-2)[..., : x.shape[-1]] if x.shape[-1] % block else rounded.reshape(x.shape)


def _quantize(x: torch.Tensor, block: int, rule: _Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., n] -> FP32 (x / s rounded [..., n], s [..., ceil(n / block)])."""
    rounded, least = _round(blocks(x.float(), block), rule)
    scale = least.view(torch.float32) / rule.normal
    return (rounded / scale).flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def fp8_simulate(x: torch.Tensor, block: int) -> torch.Tensor:
    """BF16 or FP32 [..., n] -> the same dtype and shape: what `fp8_quantize` stores, decoded. Exact in BF16."""
    return _simulate(x, block, _FP8[x.dtype])


def fp4_simulate(x: torch.Tensor, block: int = 32) -> torch.Tensor:
    """BF16 or FP32 [..., n] -> the same dtype and shape: what `fp4_quantize` stores, decoded. Exact in BF16."""
    return _simulate(x, block, _FP4[x.dtype])


def fp8_quantize(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """BF16 or FP32 [..., n] -> (float8_e4m3fn [..., n], FP32 powers of two [..., ceil(n / block)])."""
    values, scale = _quantize(x, block, _FP8[torch.float32])
    return values.to(torch.float8_e4m3fn), scale  # `values` are E4M3 numbers already: the cast rounds nothing


def fp4_quantize(x: torch.Tensor, block: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """BF16 or FP32 [..., n], n even -> (packed E2M1 uint8 [..., n/2], UE8M0 uint8 [..., ceil(n / block)]).

    E2M1 has no NaN: here the input must be finite and below 2^106.
    """
    values, scale = _quantize(x, block, _FP4[torch.float32])
    return e2m1.pack(e2m1.e2m1_encode(values)), ue8m0_encode_ceil(scale)
