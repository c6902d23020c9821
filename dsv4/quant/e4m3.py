"""E4M3 (the "fn" kind): one byte, no infinity.

      bit   7   6 5 4 3   2 1 0
            s   e e e e   m m m      e > 0:  (-1)^s * 2^(e-7) * (1 + m/8)      max  0x7E = 448, min normal 0x08 = 2^-6
                                     e = 0:  (-1)^s * 2^-6 * m/8               subnormal step 2^-9
                                     0x7F, 0xFF: NaN

Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433, table 1.
"""

from __future__ import annotations

import torch

MAX = 448.0


def e4m3_encode(x: torch.Tensor) -> torch.Tensor:
    """FP32 or BF16 of any shape -> float8_e4m3fn, round to nearest even after clamping to +-448.

    Infinities saturate, NaN stays NaN, the sign of zero is kept.
    """
    return x.clamp(-MAX, MAX).to(torch.float8_e4m3fn)


def e4m3_decode(q: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn of any shape -> FP32, exact."""
    assert q.dtype == torch.float8_e4m3fn, f"E4M3 is float8_e4m3fn, not {q.dtype}"
    return q.float()
