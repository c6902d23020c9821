"""E2M1 (FP4): four bits a value, two values a byte.

      bit   3   2 1   0
            s   e e   m      codes 0..7 = 0, 0.5, 1, 1.5, 2, 3, 4, 6;  code | 8 is the negative;  8 = -0.
                             No NaN, no infinity.

      byte  7 6 5 4 | 3 2 1 0
            hi      | lo         element 2j in the low nibble, 2j + 1 in the high one, along the input dimension.

Source: OCP Microscaling Formats v1.0, section 5.3.3.
"""

from __future__ import annotations

from functools import cache

import torch

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
@torch.inference_mode(False)  # training may need it later
def _table(device: torch.device) -> torch.Tensor:
    return torch.tensor(VALUES + tuple(-v for v in VALUES), dtype=torch.float32, device=device)


def e2m1_round(x: torch.Tensor) -> torch.Tensor:
    """FP32 of any shape -> nearest E2M1 value as FP32, ties to even, saturating at +-6, the sign of zero kept.

    The step between neighbours is half the power of two at or below |x|, and never under one half. Adding and
    removing 2^23 steps leaves FP32 no fraction bits, so that its own rounding to nearest even does the work.
    NaN stays NaN.
    """
    magnitude = x.abs().clamp_(max=MAX)
    binade = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0)
    shift = binade * 2.0**22
    return ((magnitude + shift) - shift).copysign_(x)


def e2m1_encode(x: torch.Tensor) -> torch.Tensor:
    """FP32 of any shape -> uint8 codes 0..15, rounded as `e2m1_round`. NaN has no code and must not be passed."""
    rounded = e2m1_round(x)
    magnitude = rounded.abs()
    # Codes 0..3 are 0.5 apart, 4..5 are 1 apart and 6..7 are 2 apart: three lines, and the lowest is the code.
    code = torch.minimum(torch.minimum(magnitude * 2, magnitude + 2), magnitude / 2 + 4).to(torch.uint8)
    return code | (rounded.signbit().to(torch.uint8) << 3)


def e2m1_decode(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0..15 of any shape -> FP32, exact."""
    return _table(codes.device)[codes.int()]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [..., n], n even -> uint8 bytes [..., n/2], the even element in the low nibble."""
    assert codes.shape[-1] % 2 == 0, "two codes a byte"
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 or int8 bytes [..., n] -> uint8 codes [..., 2n], the inverse of `pack`."""
    byte = packed.view(torch.uint8)
    return torch.stack((byte & 15, byte >> 4), dim=-1).flatten(-2)
