"""An index key of 128 numbers as bytes (spec 8.7): E2M1 per 32 with UE8M0 scales, or E4M3 with one FP32 scale.

    FP4     data 64 bytes, the even number in the low nibble    scales 4 UE8M0 bytes             68 in all
    FP8     data 128 bytes                                      scale  1 FP32, a power of two   132 in all

A page of n keys is n times data, then n times scales. Numbers are rounded as `activation` says; a block that is not
finite is stored as `rows` says, with NaN for its scale.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.quant import e2m1
from dsv4.quant.activation import fp4_quantize, fp8_quantize
from dsv4.quant.e8m0 import NAN, ue8m0_decode
from dsv4.quant.rows import clean_blocks

DIMS: Final = 128


class KeyRow(NamedTuple):
    """One of the two layouts."""

    name: str
    block: int  # numbers that share a scale
    row_bytes: int
    scale_bytes: int

    def page_bytes(self, rows: int) -> int:
        """Of a page of so many keys."""
        return rows * (self.row_bytes + self.scale_bytes)

    def page_rows(self, page_bytes: int) -> int:
        """Keys of a page of so many bytes."""
        return page_bytes // (self.row_bytes + self.scale_bytes)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """BF16 or FP32 [T, 128] -> uint8 (data [T, row_bytes], scales [T, scale_bytes])."""
        clean, broken = clean_blocks(x, self.block)
        if self == FP4_KEY:
            data, scales = fp4_quantize(clean, self.block)
            return data, scales.masked_fill_(broken, NAN)
        values, step = fp8_quantize(clean, self.block)
        scale = step.masked_fill_(broken, float("nan")).flatten()  # a matrix without rows has any stride
        return values.view(torch.uint8), scale.view(torch.uint8).view(-1, self.scale_bytes)

    def decode(self, data: Tensor, scales: Tensor) -> Tensor:
        """The other way: -> BF16 [T, 128]. Exact: the scales are powers of two."""
        if self == FP4_KEY:
            values, steps = e2m1.e2m1_decode(e2m1.unpack(data)), ue8m0_decode(scales)
        else:
            values, steps = data.contiguous().view(torch.float8_e4m3fn).float(), scales.contiguous().view(torch.float32)
        return (values * steps.repeat_interleave(self.block, 1)).bfloat16()

    def spans(self, pages: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Page, first byte of the data and first byte of the scales inside the page, each [T]; rows: [T] int64."""
        count = self.page_rows(pages.shape[1])
        page, slot = rows // count, rows % count
        return page, slot * self.row_bytes, count * self.row_bytes + slot * self.scale_bytes


FP4_KEY: Final = KeyRow("fp4", 32, 64, 4)
FP8_KEY: Final = KeyRow("fp8", 128, 128, 4)
