"""How 64 rows of a packed matrix lie in memory, by its format. Rows 16 w + 2 g + h; columns 32 t .. 32 t + 31.

MXFP4, 4,352 bytes:

    4,096 bytes  [4 warps][h 2][g 8][t 4][16 bytes]
      256 bytes  [64] words   bit 30 .. 23 base | 15 .. 12, 11 .. 8, 7 .. 4, 3 .. 0  step of columns 96, 64, 32, 0 ..

Eight codes are a word. Their magnitudes stay where the checkpoint has them, and select a byte of a table each. The
signs move to where the two words of widened bytes want them: nibble 2 j + 1 holds the sign of column j, nibble 2 j that
of column j + 4. The scale of 32 columns is 2^(base - 127) times 2^(step - 8), with a step of 0 to 14: as E4M3 numbers,
the codes times 2^(step - 8) are exact. A row whose scales lie further apart within 128 columns, or are NaN, makes its
256 rows of the matrix stand `apart`: there the word is the four bytes as they were.

NVFP4, 4,864 bytes:

    4,096 bytes  as above
      512 bytes  [4 warps][g 8][t 4][h 2][2]   of columns 32 t .. and 32 t + 16 ..: 8 step + the mantissa of the scale
      256 bytes  [64] FP32                     what is common to a row

A code times its E4M3 scale has up to six significant bits, too many for E4M3, but it is the sum of two such numbers:
the first four bits, and the others. So a scale (1 + m / 8) 2^e is (1 + m / 8) 2^(step - 5) times 2^(e + 5 - step), with
a step of 0 to 10 at which all those numbers are E4M3's. The second factor, which is the same for a row's 128 columns,
times the global scale is the FP32 number. Byte 88 stands for a scale of zero. Rows `apart` have the bytes of the
checkpoint there, and the global scale as their FP32 number.

FP8, 8,208 bytes, its scales powers of two or not:

    8,192 bytes  [4 warps][h 2][2][g 8][t 4][16 bytes]   E4M3 as it was
       16 bytes  [h 2] FP32, and eight bytes of zeros    scales: rows of one parity share theirs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.quant import e2m1
from dsv4.quant.e8m0 import NAN, ue8m0_decode, ue8m0_encode_ceil
from dsv4.quant.formats import FP8_BLOCK, FP8_BLOCK_F32, MXFP4, NVFP4, Format

ROWS: Final = 256
COLUMNS: Final = 128
_QUARTERS: Final = 4
MOST_STEP: Final = 14  # 6 * 2^(14 - 8) = 384 is an E4M3 number
_LARGEST: Final = 6  # of the largest scale, how far it stands above the base
_SIGN_OF: Final = [4, 0, 5, 1, 6, 2, 7, 3]  # which column's sign a nibble holds
_NIBBLE_OF: Final = [1, 3, 5, 7, 0, 2, 4, 6]  # where a column's sign is held
_BASE: Final = 23
_BYTES: Final = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
_STEPS: Final = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
NV_TOP: Final = 10  # the step of a row's largest scale: 6 * 1.875 * 2^(10 - 5) = 360 is an E4M3 number
NV_ZERO: Final = 8 * (NV_TOP + 1)
_LEAST: Final = 2.0**-126


class Rows(NamedTuple):
    """Bytes [rows, ...], a row's scales [rows, ...] as the format stores them, and its global scale [rows]."""

    data: Tensor
    scale: Tensor
    factor: Tensor


class Layout(NamedTuple):
    """quarter: bytes of 64 rows. encode: tiles and which rows of tiles stand apart. decode: the way back."""

    quarter: int
    encode: Callable[[Rows], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, Tensor], Rows]


def _codes(data: Tensor) -> Tensor:
    """E2M1 bytes [rows, columns / 2] -> [down, across, quarters, 4096]."""
    rows, half = data.shape
    codes = e2m1.unpack(data).view(rows, -1, 8)
    words = e2m1.pack(codes & 7 | codes[..., _SIGN_OF] & 8).view(rows // ROWS, _QUARTERS, 4, 8, 2, half // 64, 4, 16)
    return words.permute(0, 5, 1, 2, 4, 3, 6, 7).flatten(3)


def _uncoded(words: Tensor) -> Tensor:
    """The way back."""
    down, across = words.shape[:2]
    data = words.reshape(down, across, _QUARTERS, 4, 2, 8, 4, 16).permute(0, 2, 3, 5, 4, 1, 6, 7)
    nibbles = e2m1.unpack(data.reshape(down * ROWS, across * 64)).view(down * ROWS, -1, 8)
    return e2m1.pack((nibbles & 7 | nibbles[..., _NIBBLE_OF] & 8).flatten(1))


def _bytes(x: Tensor) -> Tensor:
    """[down, across, quarters, ...] of any dtype -> uint8 [down, across, quarters, bytes]."""
    return x.flatten(3).contiguous().view(torch.uint8)


def _by_row(x: Tensor) -> Tensor:
    """[rows, across, n] -> [down, across, quarters, 64, n]."""
    return x.view(-1, _QUARTERS, ROWS // _QUARTERS, *x.shape[1:]).permute(0, 3, 1, 2, 4)


def _rows_of(x: Tensor) -> Tensor:
    """The way back."""
    return x.permute(0, 2, 3, 1, 4).flatten(0, 2)


def _spread(apart: Tensor) -> Tensor:
    """Of rows of tiles [down] -> of rows [rows, 1, 1]."""
    return apart.bool().repeat_interleave(ROWS).view(-1, 1, 1)


def _encode_mxfp4(m: Rows) -> tuple[Tensor, Tensor]:
    scale = m.scale.view(len(m.scale), -1, 4).int()
    top = scale.amax(-1, keepdim=True)
    base = (top - _LARGEST).clamp_(min=1)
    step = scale - base + 8
    apart = ((step.amin(-1, keepdim=True) < 0) | (top == NAN)).view(-1, ROWS * scale.shape[1]).any(1)
    usual = (step << _STEPS.to(step.device)).sum(-1, keepdim=True).int() | base << _BASE
    plain = scale.type(torch.uint8).contiguous().view(torch.int32)
    words = _by_row(torch.where(_spread(apart), plain, usual))
    return torch.cat((_codes(m.data), _bytes(words)), -1).flatten(2), apart.int()


def _decode_mxfp4(tiles: Tensor, apart: Tensor, factor: Tensor) -> Rows:
    codes, words = tiles.unflatten(2, (_QUARTERS, -1)).split((4096, 256), -1)
    word = _rows_of(words.contiguous().view(torch.int32).unsqueeze(-1))
    usual = (word >> _STEPS.to(word.device) & 15) + (word >> _BASE & 255) - 8
    plain = word >> _BYTES.to(word.device) & 255
    scale = torch.where(_spread(apart), plain, usual).type(torch.uint8)
    return Rows(_uncoded(codes), scale.flatten(1), factor)


def _encode_nvfp4(m: Rows) -> tuple[Tensor, Tensor]:
    code = m.scale.view(torch.uint8).view(len(m.scale), -1, 8).int()
    # Of a subnormal scale the first bit moves to where that of others is understood to be.
    small = (code < 8).int() * ((code < 4).int() + (code < 2).int() + 1)
    exponent = torch.where(code < 8, 1 - small, code >> 3)
    exponent = exponent.masked_fill(code == 0, -99)
    mantissa = code << small & 7
    top = exponent.amax(-1, keepdim=True).clamp(min=-2)
    step = exponent - top + NV_TOP
    common = m.factor.view(-1, 1, 1) * torch.exp2(top.float() - 12)
    odd = (code >= 127) | ((step < 0) & (code > 0)) | (common.abs() < _LEAST) | ~common.isfinite()
    apart = odd.flatten(1).any(1).view(-1, ROWS).any(1)
    usual = torch.where(code == 0, NV_ZERO, 8 * step + mantissa)
    kept = torch.where(_spread(apart), code, usual).type(torch.uint8)
    each = torch.where(_spread(apart), m.factor.view(-1, 1, 1).expand_as(common), common)
    pairs = _by_row(kept).unflatten(3, (4, 8, 2)).unflatten(-1, (4, 2))  # ..., warp, g, h, t, 2
    pairs = pairs.permute(0, 1, 2, 3, 4, 6, 5, 7)
    return torch.cat((_codes(m.data), _bytes(pairs), _bytes(_by_row(each))), -1).flatten(2), apart.int()


def _decode_nvfp4(tiles: Tensor, apart: Tensor, factor: Tensor) -> Rows:
    codes, pairs, each = tiles.unflatten(2, (_QUARTERS, -1)).split((4096, 512, 256), -1)
    kept = pairs.unflatten(-1, (4, 8, 4, 2, 2)).permute(0, 1, 2, 3, 4, 6, 5, 7).flatten(6).flatten(3, 5)
    index, common = _rows_of(kept).int(), _rows_of(each.contiguous().view(torch.float32).unsqueeze(-1))
    top = torch.log2((common / factor.view(-1, 1, 1)).abs()).nan_to_num(0, 0, 0).int() + 12
    exponent, mantissa = (index >> 3) + top - NV_TOP, index & 7
    usual = torch.where(exponent > 0, exponent << 3 | mantissa, (8 | mantissa) >> (1 - exponent).clamp(0, 7))
    usual = usual.masked_fill(index == NV_ZERO, 0)
    scale = torch.where(_spread(apart), index, usual).type(torch.uint8).flatten(1)
    return Rows(_uncoded(codes), scale.view(torch.float8_e4m3fn), factor)


def _encode_fp8(m: Rows) -> tuple[Tensor, Tensor]:
    rows, columns = m.data.shape
    down, across = rows // ROWS, columns // COLUMNS
    data = m.data.view(down, _QUARTERS, 4, 8, 2, across, 4, 2, 16).permute(0, 5, 1, 2, 4, 7, 3, 6, 8)
    scale = ue8m0_decode(m.scale) if m.scale.dtype == torch.uint8 else m.scale
    scale = scale.view(down, _QUARTERS, 32, 2, across)[:, :, 0].permute(0, 3, 1, 2)
    packed = torch.cat((_bytes(data), _bytes(torch.nn.functional.pad(scale, (0, 2)))), -1)
    return packed.flatten(2), torch.zeros(down, dtype=torch.int32, device=data.device)


def _decode_fp8(tiles: Tensor, apart: Tensor, factor: Tensor) -> Rows:
    down, across = tiles.shape[:2]
    data, scale = tiles.unflatten(2, (_QUARTERS, -1)).split((8192, 16), -1)
    data = data.reshape(down, across, _QUARTERS, 4, 2, 2, 8, 4, 16).permute(0, 2, 3, 6, 4, 1, 7, 5, 8)
    scale = scale.contiguous().view(torch.float32)[..., :2].unsqueeze(3).expand(-1, -1, -1, 32, -1)
    scale = scale.permute(0, 2, 3, 4, 1).reshape(down * ROWS, across)
    return Rows(data.reshape(down * ROWS, across * COLUMNS), scale, factor)


def _decode_fp8_ue8m0(tiles: Tensor, apart: Tensor, factor: Tensor) -> Rows:
    data, scale, _ = _decode_fp8(tiles, apart, factor)
    return Rows(data, ue8m0_encode_ceil(scale), factor)


LAYOUTS: Final[dict[Format, Layout]] = {
    MXFP4: Layout(4352, _encode_mxfp4, _decode_mxfp4),
    NVFP4: Layout(4864, _encode_nvfp4, _decode_nvfp4),
    FP8_BLOCK: Layout(8208, _encode_fp8, _decode_fp8_ue8m0),
    FP8_BLOCK_F32: Layout(8208, _encode_fp8, _decode_fp8),
}
