"""Activation quantisers that a model was not trained with: NVFP4, FP8 and INT8 under scales that are no powers of two.

They are there to be studied, and hold to the same two rules as `activation`: the values are divided by the scale as
stored, and a block of zeros stays zero. FP32 inside; the result is rounded once more where the dtype of `x` is BF16,
which is exact as long as the scales are powers of two, and 2^-9 of a value otherwise (FP4 itself rounds by up to 1/6).

NVFP4, for one block of 16 numbers and a global scale g:

    s = E4M3(amax / 6 / g), at least 2^-9;  q = E2M1(x / (s g));  simulated x' = q s g

A g that is no constant but a row's or a tensor's own is amax / (6 * 448), so that the largest block has the largest s.
NaN makes its block NaN, and all that shares its scale; an infinity saturates where g is a constant, as the hardware's
conversion does, and makes NaN where it is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.quant import e2m1, e4m3
from dsv4.quant.activation import blocks

NVFP4_BLOCK = 16
NVFP4_TOP = e2m1.MAX * e4m3.MAX  # the largest number that NVFP4 holds under a global scale of 1
INT8_TOP = 127.0
_LEAST_SCALE = 2.0**-9  # the smallest E4M3 number above 0
_LEAST_NORMAL = 2.0**-126


def nvfp4_global(amax: Tensor | float) -> Tensor:
    """The global scale under which `amax` (any shape) is the largest number: amax / 2688, and 1 for zero. FP32."""
    top = torch.as_tensor(amax, dtype=torch.float32)
    return torch.where(top > 0, _over(top, NVFP4_TOP).clamp_(min=_LEAST_NORMAL), torch.where(top == 0, 1.0, top))


def nvfp4_simulate(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """BF16 or FP32 [..., n] -> the same: what NVFP4 with the global `scale` stores, decoded. Zero rows are allowed.

    scale: FP32, 0-dim or [..., 1]. Equals `formats.NVFP4` bit for bit where that has the same global scale.
    """
    if not x.numel():
        return x
    total = torch.as_tensor(scale, dtype=torch.float32, device=x.device).unsqueeze(-1)
    wide = blocks(x.float(), NVFP4_BLOCK)
    stored = _over(wide.abs().amax(-1, keepdim=True), e2m1.MAX).div_(total).clamp_(min=_LEAST_SCALE)
    step = e4m3.e4m3_decode(e4m3.e4m3_encode(stored))
    rounded = e2m1.e2m1_round(wide / (step * total)).mul_(step).mul_(total)
    return rounded.flatten(-2)[..., : x.shape[-1]].type(x.dtype)


def nvfp4_per_tensor(x: Tensor) -> Tensor:
    """NVFP4 under one global scale from the largest magnitude of all rows: a row's bits depend on its company."""
    return nvfp4_simulate(x, nvfp4_global(x.abs().amax().float())) if x.numel() else x


def nvfp4_per_token(x: Tensor) -> Tensor:
    """NVFP4 under a global scale of every row's own."""
    return nvfp4_simulate(x, nvfp4_global(x.abs().amax(-1, keepdim=True).float())) if x.numel() else x


def fp8_per_tensor(x: Tensor) -> Tensor:
    """E4M3 under one FP32 scale, amax / 448 of all rows: a row's bits depend on its company. BF16 or FP32 [..., n]."""
    if not x.numel():
        return x
    scale = _scale(x.abs().amax().float(), e4m3.MAX)
    return (e4m3.e4m3_decode(e4m3.e4m3_encode(x.float() / scale)) * scale).type(x.dtype)


def fp4_per_tensor(x: Tensor) -> Tensor:
    """E2M1 under one FP32 scale, amax / 6 of all rows: a row's bits depend on its company. BF16 or FP32 [..., n]."""
    if not x.numel():
        return x
    scale = _scale(x.abs().amax().float(), e2m1.MAX)
    return (e2m1.e2m1_round(x.float() / scale) * scale).type(x.dtype)


def int8_per_token(x: Tensor) -> Tensor:
    """Whole numbers of at most 127 under an FP32 scale per row, amax / 127, ties to even. BF16 or FP32 [..., n]."""
    if not x.numel():
        return x
    scale = _scale(x.abs().amax(-1, keepdim=True).float(), INT8_TOP)
    return ((x.float() / scale).round_().clamp_(-INT8_TOP, INT8_TOP) * scale).type(x.dtype)


def _scale(amax: Tensor, top: float) -> Tensor:
    """amax / top, and 1 for a tensor of zeros; NaN stays NaN."""
    return torch.where(amax == 0, 1.0, _over(amax, top).clamp_(min=_LEAST_NORMAL))


def _over(x: Tensor, top: float) -> Tensor:
    """x / top, rounded once on every device: by a host scalar a GPU would multiply with the rounded reciprocal."""
    return x / x.new_tensor(top)
