"""Stored matrices of experts: every code as often as another, under scales that make numbers of about a hundredth."""

from __future__ import annotations

import torch

from dsv4.quant.formats import FP8_BLOCK, MXFP4, NVFP4, Format
from dsv4.quant.tensor import QTensor


def of_format(name: str, rows: int, columns: int, fmt: Format) -> QTensor:
    """MXFP4, NVFP4, FP8 or FP8 with FP32 scales."""
    if fmt is MXFP4:
        return matrix(name, rows, columns)
    return _nvfp4(name, rows, columns) if fmt is NVFP4 else _fp8(name, rows, columns, fmt)


def matrix(name: str, rows: int, columns: int, low: int = 116, high: int = 122) -> QTensor:
    """MXFP4, under scales that differ by up to fifty."""
    draw = _draw(name, rows, columns)
    data = torch.randint(-128, 128, (rows, columns // 2), generator=draw, dtype=torch.int8)
    scale = torch.randint(low, high, MXFP4.scale_shape(rows, columns), generator=draw, dtype=torch.uint8)
    return QTensor(data, scale, MXFP4)


def _nvfp4(name: str, rows: int, columns: int) -> QTensor:
    draw = _draw(name, rows, columns)
    data = torch.randint(0, 256, (rows, columns // 2), generator=draw, dtype=torch.uint8)
    scale = torch.randint(36, 76, NVFP4.scale_shape(rows, columns), generator=draw, dtype=torch.uint8)
    total = torch.rand((), generator=draw) * 2.0**-8 + 2.0**-9
    return QTensor(data, scale.view(torch.float8_e4m3fn), NVFP4, total)


def _fp8(name: str, rows: int, columns: int, fmt: Format) -> QTensor:
    draw = _draw(name, rows, columns)
    codes = torch.randint(0, 254, (rows, columns), generator=draw, dtype=torch.uint8)
    codes = torch.where(codes >= 127, codes + 1, codes).view(torch.float8_e4m3fn)  # 127 and 255 are NaN
    shape = fmt.scale_shape(rows, columns)
    if fmt is FP8_BLOCK:
        return QTensor(codes, torch.randint(113, 117, shape, generator=draw, dtype=torch.uint8), fmt)
    return QTensor(codes, torch.rand(shape, generator=draw) * 2.0**-12 + 2.0**-14, fmt)


def _draw(name: str, rows: int, columns: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)) + rows + columns)
