"""An index vector, a key or the query of one head, in bytes: 128 numbers of four or eight bits and their scales.

    fp4     [64] E2M1 pairs, the even number in the low half, and 4 UE8M0 scales, one for 32 numbers: 68 bytes
    fp8     [128] E4M3 bytes, and one FP32 scale (little-endian): 132 bytes

A page of n keys is n times numbers, then n times scales, then zeros up to a multiple of 16 bytes:

    page    | numbers 0 | ... | numbers n-1 | scales 0 | ... | scales n-1 | pad |

Rounded as `activation` says, so FP8 has a power of two for its scale as well; whoever reads it takes any. A block that
is not finite is stored as `rows` says: zeros, and a NaN for its scale.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.quant import e2m1
from dsv4.quant.activation import fp4_quantize, fp8_quantize
from dsv4.quant.e8m0 import NAN, ue8m0_decode
from dsv4.quant.rows import clean_blocks

DIMS: Final = 128  # of every released index head
SCALE_BYTES: Final = 4
_ALIGNED: Final = 16  # bytes


class KeyLayout(NamedTuple):
    """One of the two: `block` numbers share a scale."""

    name: str
    data_bytes: int
    block: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of a key's numbers, and of its scales (`quant.paged`)."""
        return self.data_bytes, SCALE_BYTES

    def page_bytes(self, rows: int) -> int:
        """Of a page of so many keys, with its pad."""
        return -(-rows * sum(self.sizes) // _ALIGNED) * _ALIGNED

    def page_rows(self, page_bytes: int) -> int:
        """Keys of a page of so many bytes. Its pad is shorter than a key."""
        return page_bytes // sum(self.sizes)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """BF16 or FP32 [..., 128] -> uint8 (numbers [..., data_bytes], scales [..., 4])."""
        lead = x.shape[:-1]
        clean, broken = clean_blocks(x.reshape(-1, DIMS), self.block)
        if self == FP4_KEYS:
            data, scales = fp4_quantize(clean, self.block)
            scales = scales.masked_fill_(broken, NAN)
        else:
            data, step = fp8_quantize(clean, self.block)
            scales = step.masked_fill_(broken, torch.nan)
        flat = scales.flatten().view(torch.uint8)  # of no vectors a matrix of scales may have any stride
        return data.view(torch.uint8).view(*lead, self.data_bytes), flat.view(*lead, SCALE_BYTES)

    def codes(self, data: Tensor) -> Tensor:
        """uint8 [..., data_bytes] -> the numbers without their scales, FP32 [..., 128]."""
        if self == FP4_KEYS:
            return e2m1.e2m1_decode(e2m1.unpack(data))
        return data.contiguous().view(torch.float8_e4m3fn).float()

    def steps(self, scales: Tensor) -> Tensor:
        """uint8 [..., 4] -> FP32 [..., 128 / block]."""
        return ue8m0_decode(scales) if self == FP4_KEYS else scales.contiguous().view(torch.float32)

    def decode(self, data: Tensor, scales: Tensor) -> Tensor:
        """The other way: -> FP32 [..., 128]. Where scales are powers of two these are BF16 numbers."""
        return self.codes(data) * self.steps(scales).repeat_interleave(self.block, -1)


FP4_KEYS: Final = KeyLayout("fp4", 64, 32)
FP8_KEYS: Final = KeyLayout("fp8", 128, 128)
KEY_LAYOUTS: Final = {one.name: one for one in (FP4_KEYS, FP8_KEYS)}
