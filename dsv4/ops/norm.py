"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in FP32 with one rounding at the end.

    x: [..., D]; weight: [D] FP32, used as it is (no +1); returns x's shape and dtype.
    """
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * scaled).type(x.dtype)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """Weightless RMS normalisation of each query head, rounded to x's dtype after every step as the reference does.

    x: [T, H, D]; returns the same. The mean is taken in FP32 and rounded (`Tensor.mean` of a BF16 tensor).
    """
    mean = x.square().float().mean(-1, keepdim=True).type(x.dtype)
    return x * torch.rsqrt((mean + eps).float()).type(x.dtype)
