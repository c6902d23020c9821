"""The activation quantisers alone, held against a search through the tables of their formats."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.check.cases.inputs import (
    BF16,
    BIG,
    FLASH,
    MANY,
    PRO,
    e2m1_values,
    e4m3_values,
    edges,
    normal,
    padded,
    sparse,
)
from dsv4.check.cases.norm import DTYPES, FORMATS, TIMED, size_of
from dsv4.check.contract import Arguments, Case
from dsv4.ops.quantize import quantize
from dsv4.quant import e2m1
from dsv4.quant.formats import FP8_ROW, NVFP4, Format
from dsv4.quant.tensor import QTensor


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Codes of the nearest of `values` to |x|, of the even one at a tie, of the last for all beyond; sign on top."""
    size = np.abs(x)
    code = np.clip(np.searchsorted(values, size), 1, len(values) - 1)
    low, high = size - values[code - 1], values[code] - size
    code = np.where((low < high) | ((low == high) & (code % 2 == 1)), code - 1, code)
    sign = 128 if len(values) > 8 else 8
    return np.asarray(np.where(np.signbit(x), code + sign, code), np.uint8)


def searched(x: Tensor, fmt: Format, scale: Any = None) -> QTensor:
    """What `quantize` has to store."""
    total = _global(x.float().numpy(), scale)
    codes, scales = search(x, fmt, fmt.block[1], total)
    data = torch.from_numpy(codes)
    data = data.view(torch.float8_e4m3fn) if fmt is FP8_ROW else e2m1.pack(data).view(fmt.data_dtype)
    shared = torch.from_numpy(scales).view(fmt.scale_dtype)
    return QTensor(data, shared, fmt, torch.from_numpy(total) if fmt is NVFP4 else None)


def search(x: Tensor, fmt: Format, width: int, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [T, n] and scale bytes of blocks of `width`, by the definitions and without their arithmetic."""
    values = (e4m3_values() if fmt is FP8_ROW else e2m1_values()).double().numpy()
    columns = x.shape[1]
    count = -(-columns // width)
    wide = np.pad(x.float().numpy(), ((0, 0), (0, count * width - columns))).reshape(len(x), count, width)
    stored = np.isfinite(wide).all(-1)
    clean = np.where(stored[..., None], wide, np.float32(0))
    scales, step = _nvfp4_scale(clean, total) if fmt is NVFP4 else _power_scale(clean, fmt)
    quotient = clean / step[..., None] if fmt is NVFP4 else clean.astype(np.float64) / step[..., None]
    codes = nearest(quotient.astype(np.float64), values) * stored[..., None]
    scales = np.where(stored, scales, 0x7F if fmt is NVFP4 else 255)
    return codes.reshape(len(x), count * width)[:, :columns].astype(np.uint8), scales.astype(np.uint8)


def _power_scale(clean: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the least power of two that is at least amax / top, and these numbers."""
    top, floor = (448.0, 1e-4) if fmt is FP8_ROW else (6.0, 6.0 * 2.0**-126)
    amax = np.maximum(np.abs(clean).max(-1, initial=0), np.float32(floor))
    mantissa, exponent = np.frexp(amax * (np.float32(1) / np.float32(top)))
    exponent = exponent - (mantissa == 0.5)
    return exponent + 127, 2.0 ** exponent.astype(np.float64)


def _nvfp4_scale(clean: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of amax / 6 in units of the global scale, rounded to E4M3, and what they stand for; FP32 throughout."""
    amax = np.abs(clean).max(-1, initial=0)
    wanted = np.maximum(amax / np.float32(6) / total, np.float32(2.0**-9))
    code = nearest(wanted.astype(np.float64), e4m3_values().double().numpy())
    return code, e4m3_values().numpy()[code] * total


def _global(x: np.ndarray, scale: Any) -> np.ndarray:
    if scale is None:
        return np.array(1, np.float32)
    if isinstance(scale, Tensor):
        return np.array(float(scale), np.float32)
    clean = x.copy()
    for start in range(0, x.shape[1], 16):
        part = clean[:, start : start + 16]
        part[~np.isfinite(part).all(1)] = 0
    amax = np.abs(clean).max(1, keepdims=True, initial=0)
    amax = amax if scale == "row" else amax.max(initial=0)
    least = np.float32(2.0**-126)
    return np.where(amax > 0, np.maximum(amax / np.float32(2688), least), np.float32(1)).astype(np.float32)


def cases() -> Iterator[Case]:
    case = partial(Case, op=quantize, oracle=lambda given, found: searched(*given))
    for label, fmt, scale in FORMATS:
        alone = () if scale == "tensor" else (0,)
        for name, dtype in DTYPES.items():
            for tokens, width in _shapes(fmt):
                make = partial(_normal, tokens, width, dtype, fmt, scale)
                given = f"{label} {tokens} x {width} {name}"
                yield case(name=given, make=make, tokens=alone, size=size_of(tokens, width))
            yield case(name=f"{label} edges {name}", make=partial(_edges, dtype, fmt, scale), tokens=alone)
            for kind, layout in (("padded rows", padded), ("every other number", sparse)):
                make = partial(_strided, layout, dtype, fmt, scale)
                yield case(name=f"{label} {kind} {name}", make=make, tokens=alone, refusable=True)
    for label, fmt, scale in TIMED:
        for tokens, width, bench in ((1, FLASH, "flash"), (MANY, FLASH, "flash"), (1, PRO, "pro"), (MANY, PRO, "pro")):
            make = partial(_normal, tokens, width, BF16, fmt, scale)
            size, named = size_of(tokens, width, bench), f"{bench} {label}"
            oracle = None if tokens == MANY else case.keywords["oracle"]
            yield case(name=f"{named} {tokens}", make=make, tokens=(0,), size=size, bench=named, oracle=oracle)
    make = partial(_normal, BIG, FLASH, BF16, FP8_ROW, None)
    yield case(name=f"fp8 {BIG} x {FLASH}", make=make, tokens=(0,), size="big", oracle=None)


def _shapes(fmt: Format) -> tuple[tuple[int, int], ...]:
    """Whole blocks and short last ones, the shortest among them; no token, one, three."""
    width, least = fmt.block[1], fmt.values_per_byte
    return (1, least), (1, width), (3, width + least), (0, 2 * width), (3, 5 * width - least), (3, FLASH), (3, PRO)


def _normal(tokens: int, width: int, dtype: torch.dtype, fmt: Format, scale: Any) -> Arguments:
    return _with(normal("x", tokens, width, dtype=dtype, size=2), fmt, scale)


def _strided(layout: Any, dtype: torch.dtype, fmt: Format, scale: Any) -> Arguments:
    return _with(layout(normal("x", 3, 256, dtype=dtype)), fmt, scale)


def _edges(dtype: torch.dtype, fmt: Format, scale: Any) -> Arguments:
    values = e4m3_values() if fmt is FP8_ROW else e2m1_values()
    return _with(edges(values, fmt.block[1], 17 * fmt.block[1] // 4, dtype), fmt, scale)


def _with(x: Tensor, fmt: Format, scale: Any) -> Arguments:
    return (x, fmt) if scale is None else (x, fmt, scale)
