"""UE8M0: a scale that is one exponent byte.

      bit   7 6 5 4 3 2 1 0
            e e e e e e e e      value = 2^(byte - 127), bytes 0..254;  255 = NaN.  No sign, no zero.

The bytes are held as `torch.uint8` everywhere: a numeric conversion of a byte (127 read as 127.0 rather than 1.0)
is the classic way to ruin a model silently. Source: OCP Microscaling Formats v1.0, section 5.4.
"""

from __future__ import annotations

from functools import cache

import torch

ONE = 127
NAN = 255


@cache
@torch.inference_mode(False)  # training may need it later
def _table(device: torch.device) -> torch.Tensor:
    return torch.tensor([2.0 ** (b - ONE) for b in range(NAN)] + [float("nan")], dtype=torch.float32, device=device)


def ue8m0_decode(scale: torch.Tensor) -> torch.Tensor:
    """uint8 bytes of any shape -> FP32 powers of two (2^-127, byte 0, is an FP32 subnormal); byte 255 -> NaN."""
    assert scale.dtype == torch.uint8, f"UE8M0 bytes are uint8, not {scale.dtype}"
    return _table(scale.device)[scale.int()]


def ue8m0_encode_ceil(x: torch.Tensor) -> torch.Tensor:
    """FP32 x >= 0 of any shape -> uint8 bytes of the smallest power of two >= x; exact powers stay put.

    Below 2^-127 (zero too) the byte is 0, above 2^127 it is 254. NaN, Inf and negative numbers give byte 255.
    """
    assert x.dtype == torch.float32, f"UE8M0 encodes FP32, not {x.dtype}"
    bits = x.contiguous().view(torch.int32)
    byte = ((bits + 0x7FFFFF) >> 23).clamp_(max=NAN - 1)
    byte.masked_fill_(x <= 2.0**-127, 0)
    return byte.masked_fill_(~(x.isfinite() & (x >= 0)), NAN).to(torch.uint8)
