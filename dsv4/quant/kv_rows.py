"""A cache row of one token: keys and values of every head, in the layout that serving stacks share (spec 8.7).

    row     [D - R] E4M3 bytes, then [R] BF16 numbers (little-endian): the R dimensions that carry the position
    scales  ceil((D - R) / 64) UE8M0 bytes, one for 64 E4M3 bytes, zeros up to a multiple of 8

For 512 dimensions with 64 of them rotated: 448 + 128 = 576 bytes, and 7 + 1 = 8: 584 in all. A page of n rows is n
rows, then n times scales, then zeros up to a multiple of a row:

    page    | row 0 | row 1 | ... | row n-1 | scales 0 | ... | scales n-1 | pad |

The E4M3 part is rounded as `activation` says; where it is not finite it is stored as `rows` says.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.quant.activation import fp8_quantize
from dsv4.quant.e8m0 import NAN, ue8m0_decode, ue8m0_encode_ceil
from dsv4.quant.rows import clean_blocks

BLOCK: Final = 64  # E4M3 bytes that share a scale
_ALIGNED: Final = 8  # bytes


class KvRow(NamedTuple):
    """The layout for heads of `dims` numbers, the last `rope_dims` of them rotated."""

    dims: int
    rope_dims: int

    @property
    def row_bytes(self) -> int:
        """Of the E4M3 and BF16 numbers."""
        return self.dims + self.rope_dims

    @property
    def blocks(self) -> int:
        """Scales in use."""
        return -(-(self.dims - self.rope_dims) // BLOCK)

    @property
    def scale_bytes(self) -> int:
        """Of the scales, with their pad."""
        return -(-self.blocks // _ALIGNED) * _ALIGNED

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of a row's numbers, and of its scales (`quant.paged`)."""
        return self.row_bytes, self.scale_bytes

    def page_bytes(self, rows: int) -> int:
        """Of a page of so many rows, with its pad."""
        return -(-rows * sum(self.sizes) // self.row_bytes) * self.row_bytes

    def page_rows(self, page_bytes: int) -> int:
        """Rows of a page of so many bytes. Its pad is shorter than a row."""
        return page_bytes // sum(self.sizes)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """BF16 or FP32 [T, D] -> uint8 (rows [T, row_bytes], scales [T, scale_bytes])."""
        straight, turned = x.split((self.dims - self.rope_dims, self.rope_dims), 1)
        clean, broken = clean_blocks(straight, BLOCK)
        data, step = fp8_quantize(clean, BLOCK)
        scales = x.new_zeros(len(x), self.scale_bytes, dtype=torch.uint8)
        scales[:, : self.blocks] = ue8m0_encode_ceil(step).masked_fill_(broken, NAN)
        return torch.cat((data.view(torch.uint8), turned.bfloat16().contiguous().view(torch.uint8)), 1), scales

    def decode(self, rows: Tensor, scales: Tensor) -> Tensor:
        """The other way: -> BF16 [T, D]. Exact: an E4M3 number times a power of two is a BF16 number."""
        data, turned = rows.split((self.dims - self.rope_dims, 2 * self.rope_dims), 1)
        steps = ue8m0_decode(scales[:, : self.blocks]).repeat_interleave(BLOCK, 1)[:, : data.shape[1]]
        values = data.contiguous().view(torch.float8_e4m3fn).float() * steps
        return torch.cat((values.bfloat16(), turned.contiguous().view(torch.bfloat16)), 1)
