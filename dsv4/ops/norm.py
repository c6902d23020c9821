"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.op import op
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import Format
from dsv4.quant.rows import GlobalScale
from dsv4.quant.tensor import QTensor


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in FP32 with one rounding at the end.

    x: [..., D]; weight: [D] FP32, used as it is (no +1); returns x's shape and dtype.
    """
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * scaled).type(x.dtype)


@op
def unit_rms(x: Tensor, eps: float) -> Tensor:
    """Weightless RMS normalisation of each query head, rounded to x's dtype after every step as the reference does.

    x: [T, H, D]; returns the same. The mean is taken in FP32 and rounded (`Tensor.mean` of a BF16 tensor).
    """
    mean = x.square().float().mean(-1, keepdim=True).type(x.dtype)
    return x * torch.rsqrt((mean + eps).float()).type(x.dtype)


@op
def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, fmt: Format, scale: GlobalScale = None
) -> tuple[Tensor, QTensor]:
    """`rms_norm` of x [T, D], and the same as `quantize` stores it: router and compressors read the first."""
    y = rms_norm(x, weight, eps)
    return y, quantize(y, fmt, scale)
