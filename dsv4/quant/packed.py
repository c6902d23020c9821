"""Matrices of experts in the order in which Hopper's tensor cores take them: packed once at load, back without loss.

A tile is 256 rows of 128 columns in one piece, so that a copy engine reads memory from end to end: four quarters of 64
rows, each what four warps multiply, with all that belongs to it. How a quarter lies in memory its format says
(dsv4/quant/packed_formats.py): first the numbers of the four warps, then the scales.

A thread of a warpgroup's product holds rows g and g + 8 of sixteen, here neighbours 2 g and 2 g + 1 (so gate and up of
one hidden column, or two numbers of a result), and of each one the columns 32 t .. 32 t + 31 of 128.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.quant.formats import Format, FormatError
from dsv4.quant.packed_formats import COLUMNS, LAYOUTS, ROWS, Rows
from dsv4.quant.tensor import QTensor

__all__ = ["COLUMNS", "ROWS", "Packed", "pack", "padded", "stack", "tile_bytes", "unpack", "values"]
PACKED: Final = tuple(LAYOUTS)


class Packed(NamedTuple):
    """One matrix [rows, columns], or E of them.

    tiles: uint8 [(E,) rows / 256, columns / 128, `tile_bytes`]. apart: int32 [(E,) rows / 256], 1 where scales are the
    bytes of the checkpoint. factor: FP32 [(E,) P], the global scales of the P stored matrices whose rows alternate.
    """

    tiles: Tensor
    apart: Tensor
    factor: Tensor
    format: Format

    @property
    def shape(self) -> tuple[int, int]:
        """Logical (out, in) of one matrix."""
        return self.tiles.shape[-3] * ROWS, self.tiles.shape[-2] * COLUMNS

    def matrix(self, number: int) -> Packed:
        """One matrix of E."""
        return Packed(self.tiles[number], self.apart[number], self.factor[number], self.format)


def tile_bytes(fmt: Format) -> int:
    """Of 256 rows and 128 columns."""
    return 4 * LAYOUTS[fmt].quarter


def pack(*parts: QTensor) -> Packed:
    """One matrix, or several of one shape and format as one whose rows alternate: the first's row 0, the second's, ...

    Of `PACKED` formats, rows together a multiple of 256, columns of 128, on any device. FormatError for others.
    """
    first = parts[0]
    rows, columns, fmt = len(parts) * first.shape[0], first.shape[1], first.format
    alike = all((part.shape, part.format) == (first.shape, fmt) for part in parts)
    whole = all(part.global_scale is None or part.global_scale.numel() == 1 for part in parts)
    if (
        fmt not in LAYOUTS
        or not alike
        or not whole
        or rows % ROWS
        or columns % COLUMNS
        or first.shape[0] % fmt.block[0]
    ):
        got = " and ".join(f"{part.format.name} {part.shape[0]} x {part.shape[1]}" for part in parts)
        names = ", ".join(known.name for known in PACKED)
        wanted = f"one of {names} with one global scale, together multiples of {ROWS} and {COLUMNS}"
        raise FormatError("a matrix cannot be packed", got=got, wanted=wanted)
    factor = torch.cat([_factor(part) for part in parts])
    height = fmt.block[0]
    data = torch.stack([part.data.view(torch.uint8) for part in parts], 1).flatten(0, 1)
    scale = torch.stack([part.scale.repeat_interleave(height, 0) for part in parts], 1).flatten(0, 1)
    tiles, apart = LAYOUTS[fmt].encode(Rows(data, scale, factor.repeat(first.shape[0])))
    return Packed(tiles, apart, factor, fmt)


def padded(q: QTensor) -> QTensor:
    """With rows of zeros behind it, if its rows are no multiple of 256."""
    behind = -q.shape[0] % ROWS
    if not behind:
        return q
    high = q.format.block[0]
    data = torch.cat((q.data.view(torch.uint8), q.data.new_zeros(behind, q.data.shape[1]).view(torch.uint8)))
    scale = torch.cat((q.scale, q.scale[-1:].expand(behind // high, -1)))
    return QTensor(data.view(q.data.dtype), scale, q.format, q.global_scale)


def _factor(part: QTensor) -> Tensor:
    return torch.ones(1, device=part.device) if part.global_scale is None else part.global_scale.float().view(1)


def unpack(packed: Packed) -> list[QTensor]:
    """The matrices that were packed, to the bit."""
    fmt, parts = packed.format, len(packed.factor)
    rows = packed.shape[0] // parts
    data, scale, _ = LAYOUTS[fmt].decode(packed.tiles, packed.apart, packed.factor.repeat(rows))
    found = []
    for number in range(parts):
        own = data[number::parts].contiguous().view(fmt.data_dtype)
        total = packed.factor[number] if fmt.has_global_scale else None
        found.append(QTensor(own, scale[number :: parts * fmt.block[0]].contiguous(), fmt, total))
    return found


def values(packed: Packed) -> Tensor:
    """The decoded matrix, FP32 [rows, columns], its rows as they are packed."""
    return torch.stack([part.values() for part in unpack(packed)], 1).flatten(0, 1)


def stack(matrices: Iterable[Sequence[QTensor]], count: int) -> Packed:
    """`count` matrices of one shape, each as `pack` takes it, so that no more than one lies twice in memory."""
    stacked: Packed | None = None
    for number, one in enumerate(pack(*parts) for parts in matrices):
        if stacked is None:
            tiles, apart, factor = (part.new_empty((count, *part.shape)) for part in one[:3])
            stacked = Packed(tiles, apart, factor, one.format)
        elif (one.format, one.tiles.shape) != (stacked.format, stacked.tiles.shape[1:]):
            got = f"{one.format.name} {one.shape[0]} x {one.shape[1]}"
            wanted = f"{stacked.format.name} {stacked.shape[0]} x {stacked.shape[1]}"
            raise FormatError("matrices cannot be stacked", got=got, wanted=wanted)
        for place, part in zip(stacked[:3], one[:3], strict=True):
            place[number] = part
    assert stacked is not None, "at least one matrix"
    return stacked
