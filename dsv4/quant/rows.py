"""Activations as stored rows: what a quantised matrix reads, in bytes.

The rules are those of `activation` (FP8_ROW per 128, MXFP4 per 32: power-of-two scales, rounded up) and of `scaled`
(NVFP4 per 16). A number that is not finite cannot be stored: its block gets the NaN scale (UE8M0 byte 255, E4M3 byte
0x7F) and zeros for data, so that it decodes to NaN and touches no other block.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

from dsv4.quant import e2m1, e4m3
from dsv4.quant.activation import blocks, fp4_quantize, fp8_quantize
from dsv4.quant.e8m0 import NAN, ue8m0_encode_ceil
from dsv4.quant.formats import FP8_ROW, MXFP4, NVFP4, Format, FormatError
from dsv4.quant.scaled import nvfp4_global
from dsv4.quant.tensor import QTensor

GlobalScale = Tensor | Literal["row", "tensor"] | None
LEAST_NVFP4_SCALE: Final = 2.0**-9  # the smallest E4M3 number above 0


def encode_rows(x: Tensor, fmt: Format, scale: GlobalScale = None) -> QTensor:
    """BF16 or FP32 [T, n] -> the stored rows. FormatError for a format of weights alone, or pairs that do not fit.

    scale: NVFP4's global one. None is 1; a 0-dim FP32 tensor is a calibrated one; "row" takes amax / 2688 of each row;
    "tensor" takes it of all rows, so that a row's bytes depend on its company: for studies alone.
    """
    fmt.data_shape(x.shape[0], x.shape[1])
    if fmt is NVFP4:
        return _nvfp4(x, scale)
    assert scale is None, f"{fmt.name} has no global scale"
    clean, broken = clean_blocks(x, fmt.block[1])
    if fmt is FP8_ROW:
        data, step = fp8_quantize(clean, FP8_ROW.block[1])
        return QTensor(data, ue8m0_encode_ceil(step).masked_fill_(broken, NAN), FP8_ROW)
    if fmt is MXFP4:
        data, step = fp4_quantize(clean, MXFP4.block[1])
        return QTensor(data.view(torch.int8), step.masked_fill_(broken, NAN), MXFP4)
    raise FormatError("no format of activations", got=fmt.name, wanted="fp8_row, mxfp4 or nvfp4")


def clean_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """FP32 [T, n] with zeros in the blocks that cannot be stored, and which these are, [T, ceil(n / block)]."""
    x = x.float()
    broken = ~blocks(x, block).isfinite().all(-1)
    return x.masked_fill(broken.repeat_interleave(block, 1)[:, : x.shape[1]], 0.0), broken


def _nvfp4(x: Tensor, given: GlobalScale) -> QTensor:
    (clean, broken), n = clean_blocks(x, NVFP4.block[1]), x.shape[1]
    total = _global(clean, given)
    parts = blocks(clean, NVFP4.block[1])
    amax = parts.abs().amax(-1) if parts.numel() else parts.new_zeros(parts.shape[:-1])
    scale = e4m3.e4m3_encode((amax / amax.new_tensor(e2m1.MAX) / total).clamp_(min=LEAST_NVFP4_SCALE))
    step = e4m3.e4m3_decode(scale) * total
    codes = e2m1.e2m1_encode((parts / step.unsqueeze(-1)).flatten(-2)[:, :n])
    nan = torch.tensor(0x7F, dtype=torch.uint8, device=x.device)
    scale = torch.where(broken, nan, scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    return QTensor(e2m1.pack(codes), scale, NVFP4, total)


def _global(x: Tensor, given: GlobalScale) -> Tensor:
    """FP32, 0-dim or [T, 1]."""
    if given is None:
        return x.new_tensor(1.0)
    if isinstance(given, Tensor):
        return given
    rows = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
    if given == "row":
        return nvfp4_global(rows)
    return nvfp4_global(rows.max() if len(x) else 0.0).to(x.device)
