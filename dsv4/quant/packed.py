"""MXFP4 matrices in the order in which Hopper's tensor cores take them: packed once at load, and back without loss.

A tile is 256 rows of 128 columns, 17,408 bytes in one piece, so that a copy engine reads memory from end to end:

    16,384 bytes  [16 warps][2][8][4][16 bytes]   row 16 w + 2 g + h, columns 32 t .. 32 t + 31 at [w][h][g][t]
     1,024 bytes  [256] words                     the scales of a row

A thread of a warpgroup's product holds rows g and g + 8 of sixteen, here neighbours 2 g and 2 g + 1 (so gate and up of
one hidden column, or two numbers of a result), and of each one the columns of one scale. Eight codes are a word. Their
magnitudes stay where MXFP4 has them, and select a byte of a table each. The signs move to where the two words of
widened bytes want them: nibble 2 j + 1 holds the sign of column j, nibble 2 j that of column j + 4.

    word of scales    bit 30 .. 23 base | 15 .. 12, 11 .. 8, 7 .. 4, 3 .. 0  step of columns 96.., 64.., 32.., 0..

The scale of 32 columns is 2^(base - 127) times 2^(step - 8), with a step of 0 to 14: as E4M3 numbers, the codes times
2^(step - 8) are exact. A row whose scales lie further apart within 128 columns, or are NaN, makes its 256 rows of the
matrix stand `apart`: there the word is the four bytes as they were.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.quant import e2m1
from dsv4.quant.e8m0 import NAN
from dsv4.quant.formats import MXFP4, FormatError
from dsv4.quant.tensor import QTensor

ROWS: Final = 256
COLUMNS: Final = 128
DATA_BYTES: Final = ROWS * COLUMNS // 2
TILE_BYTES: Final = DATA_BYTES + 4 * ROWS
MOST_STEP: Final = 14  # 6 * 2^(14 - 8) = 384 is an E4M3 number
_LARGEST: Final = 6  # of the largest scale, how far it stands above the base
_SIGN_OF: Final = [4, 0, 5, 1, 6, 2, 7, 3]  # which column's sign a nibble holds
_NIBBLE_OF: Final = [1, 3, 5, 7, 0, 2, 4, 6]  # where a column's sign is held
_BASE: Final = 23
_BYTES: Final = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
_STEPS: Final = torch.tensor([0, 4, 8, 12], dtype=torch.int32)


class Packed(NamedTuple):
    """One matrix [rows, columns], or E of them.

    tiles: uint8 [(E,) rows / 256, columns / 128, 17408]. apart: int32 [(E,) rows / 256], 1 where scales are bytes.
    """

    tiles: Tensor
    apart: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Logical (out, in) of one matrix."""
        return self.tiles.shape[-3] * ROWS, self.tiles.shape[-2] * COLUMNS

    def matrix(self, number: int) -> Packed:
        """One matrix of E."""
        return Packed(self.tiles[number], self.apart[number])


def pack(q: QTensor) -> Packed:
    """MXFP4 [rows, columns], multiples of 256 and 128, on any device. FormatError for others."""
    rows, columns = q.shape
    if q.format is not MXFP4 or rows % ROWS or columns % COLUMNS:
        wanted = f"mxfp4, multiples of {ROWS} and {COLUMNS}"
        raise FormatError("a matrix cannot be packed", got=f"{q.format.name} {rows} x {columns}", wanted=wanted)
    down, across = rows // ROWS, columns // COLUMNS
    codes = e2m1.unpack(q.data).view(rows, columns // 8, 8)
    data = e2m1.pack(codes & 7 | codes[..., _SIGN_OF] & 8)
    data = data.view(down, 16, 8, 2, across, 4, 16).permute(0, 4, 1, 3, 2, 5, 6).reshape(down, across, DATA_BYTES)
    words, apart = _words(q.scale.view(down, ROWS, across, 4).transpose(1, 2).int())
    return Packed(torch.cat((data, words.view(torch.uint8).flatten(-2)), -1), apart)


def _words(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [down, across, 256, 4] -> the words [down, across, 256, 1] and which rows of tiles stand apart, [down]."""
    top = scale.amax(-1, keepdim=True)
    base = (top - _LARGEST).clamp_(min=1)
    step = scale - base + 8
    apart = ((step.amin(-1, keepdim=True) < 0) | (top == NAN)).flatten(1).any(1)
    usual = (step << _STEPS.to(step.device)).sum(-1, keepdim=True) | base << _BASE
    plain = scale.type(torch.uint8).contiguous().view(torch.int32)
    return torch.where(apart.view(-1, 1, 1, 1), plain, usual.int()), apart.int()


def unpack(packed: Packed) -> QTensor:
    """The matrix that was packed, to the bit."""
    (rows, columns), (down, across) = packed.shape, packed.tiles.shape[:2]
    data, words = packed.tiles.split((DATA_BYTES, 4 * ROWS), -1)
    data = data.reshape(down, across, 16, 2, 8, 4, 16).permute(0, 2, 4, 3, 1, 5, 6).reshape(rows, columns // 2)
    nibbles = e2m1.unpack(data).view(rows, columns // 8, 8)
    codes = (nibbles & 7 | nibbles[..., _NIBBLE_OF] & 8).view(rows, columns)
    words = words.contiguous().view(torch.int32).view(down, across, ROWS, 1)
    usual = (words >> _STEPS.to(words.device) & 15) + (words >> _BASE & 255) - 8
    plain = words >> _BYTES.to(words.device) & 255
    scale = torch.where(packed.apart.view(-1, 1, 1, 1).bool(), plain, usual).transpose(1, 2).reshape(rows, -1)
    return QTensor(e2m1.pack(codes).view(torch.int8), scale.type(torch.uint8), MXFP4)


def stack(matrices: Iterable[QTensor], count: int) -> Packed:
    """`count` matrices of one shape, one after another, so that no more than one lies twice in memory."""
    tiles = apart = torch.empty(0)
    for number, one in enumerate(map(pack, matrices)):
        if not number:
            tiles, apart = (part.new_empty((count, *part.shape)) for part in one)
        tiles[number], apart[number] = one
    return Packed(tiles, apart)
