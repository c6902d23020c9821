"""Exact changes of format: MXFP4 to FP8 128x128, to FP8 rows, and to NVFP4. What cannot be exact is refused or marked.

All three rest on one fact. An E2M1 value times 2^k is an E4M3 number for every code just when -8 <= k <= 6 (from
0.5 * 2^-8 = 2^-9, the smallest E4M3 number, to 6 * 2^6 = 384), so scales that lie within 2^14 of each other can move
into the codes. A value of zero moves anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4.quant import e2m1, e4m3
from dsv4.quant.e8m0 import NAN, ONE, ue8m0_decode
from dsv4.quant.formats import FP8_BLOCK, NVFP4, FormatError, has_nan_scale
from dsv4.quant.tensor import QTensor

HEADROOM = 6  # a folded scale is the largest one over 2^6
SPAN = 14  # log2 of the largest ratio of two scales that always folds
_NVFP4_TOP = 8  # the largest 32-block gets the NVFP4 scale 2^8; the smallest E4M3 number is 2^-9


class Widened(NamedTuple):
    """FP4 rows as FP8 rows: value(i, j) = E4M3(data[i, j]) * 2^(scale[i] - 127)."""

    data: torch.Tensor  # float8_e4m3fn [out, in]; NaN throughout the rows that do not fit
    scale: torch.Tensor  # uint8 UE8M0 [out]
    exact: torch.Tensor  # bool [out]


def widen_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 E2M1 codes of any shape -> float8_e4m3fn with 2^-6 times their value: the bits, two places up.

    The three magnitude bits `eem` land on E4M3's `00ee m00`, subnormals on subnormals; exact for all 16 codes.
    """
    return (((codes & 8) << 4) | ((codes & 7) << 2)).view(torch.float8_e4m3fn)


def widen_fp4_to_e4m3(q: QTensor) -> Widened:
    """MXFP4 [out, in] -> FP8 with one scale a row, the 32-block scales folded into the codes where that is exact.

    A row fits when its scales lie within 2^14 of the largest, or the blocks further down hold only values that still
    fit (zeros always do). A NaN scale makes its row unfit.
    """
    top = q.scale.amax(1)
    data, fits = _fold(q, top[:, None].expand_as(q.scale))
    exact = fits.all(1) & (top >= HEADROOM)
    data = torch.where(exact[:, None], data.view(torch.uint8), 0x7F).view(torch.float8_e4m3fn)
    return Widened(data, torch.where(exact, top - HEADROOM, ONE).to(torch.uint8), exact)


def mxfp4_to_fp8(q: QTensor) -> QTensor:
    """MXFP4 [out, in] -> FP8_BLOCK of exactly the same values, the scale of a block its largest over 2^6.

    FormatError where a 128x128 block's scales are too far apart, or NaN, or under 2^-121. The rule is that of the
    reference convert.py, which does not check.
    """
    _refuse_nan(q)
    groups = 128 // q.format.block[1]  # 32-blocks in a row of a 128x128 block
    rows, cols = q.scale.shape
    down, across = FP8_BLOCK.scale_shape(*q.shape)
    padded = torch.nn.functional.pad(q.scale, (0, -cols % groups, 0, -rows % 128))
    top = padded.view(down, 128, across, groups).amax((1, 3))
    spread = top.repeat_interleave(128, 0)[:rows].repeat_interleave(groups, 1)[:, :cols]
    data, fits = _fold(q, spread)
    if not bool(fits.all()):
        raise _too_far("fp8", q, fits, f"scales within 2^{SPAN} in every 128x128 block")
    if bool((top < HEADROOM).any()):
        raise FormatError("mxfp4 does not fit fp8", got="a scale under 2^-121", wanted="2^-121 or more")
    return QTensor(data, top - HEADROOM, FP8_BLOCK)


def mxfp4_to_nvfp4(q: QTensor, top: int | None = None) -> QTensor:
    """MXFP4 [out, in] -> NVFP4 of exactly the same values: nibbles copied, each 32-block becoming two 16-blocks.

    `top` is the largest scale byte among the matrices that share weight_scale_2 (w1 and w3 of an expert); by default
    this matrix's own. weight_scale_2 = 2^M with M = (top - 127) - 8, and weight_scale = 2^(k - M). FormatError for
    NaN scales and for blocks of non-zero values more than 2^17 under the top (ModelOpt's cast).
    """
    _refuse_nan(q)
    own = int(q.scale.max())
    top = own if top is None else top
    assert top >= own, "the shared top is the largest byte of all the matrices that share it"
    exponent = q.scale.int() - top + _NVFP4_TOP
    codes = e2m1.unpack(q.data)
    fits = (_per_value(exponent, q) >= -9) | ((codes & 7) == 0)
    if not bool(fits.all()):
        raise _too_far("nvfp4", q, fits, f"scales within 2^{_NVFP4_TOP + 9} of the largest")
    scale = _power_of_two(exponent.clamp(min=-9)).to(torch.float8_e4m3fn)
    wanted = NVFP4.scale_shape(*q.shape)[1]  # a last 32-block of 16 values or fewer is one 16-block
    total = torch.tensor(2.0 ** (top - ONE - _NVFP4_TOP), dtype=torch.float32, device=q.device)
    scale = scale.view(torch.uint8).repeat_interleave(2, 1)[:, :wanted].contiguous().view(torch.float8_e4m3fn)
    return QTensor(q.data.view(torch.uint8), scale, NVFP4, total)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return ue8m0_decode((exponent + ONE).to(torch.uint8))


def _per_value(per_block: torch.Tensor, q: QTensor) -> torch.Tensor:
    return per_block.repeat_interleave(q.format.block[1], 1)[:, : q.shape[1]]


def _fold(q: QTensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with 2^(scale - top + 6) multiplied in -> (E4M3 [out, in], whether each is exact). top: uint8 as scale.

    From 2^-12 down every value but zero is lost to E4M3, so that the clamp changes no verdict.
    """
    factor = _power_of_two((q.scale.int() - top.int() + HEADROOM).clamp(min=-12))
    values = e2m1.e2m1_decode(e2m1.unpack(q.data)) * _per_value(factor, q)
    data = e4m3.e4m3_encode(values)
    nan = _per_value(q.scale == NAN, q)
    return data, (e4m3.e4m3_decode(data) == values) & ~nan


def _refuse_nan(q: QTensor) -> None:
    if has_nan_scale(q):
        raise FormatError(f"{q.format.name} has a scale that is no number", got="NaN", wanted="bytes 0 to 254")


def _too_far(name: str, q: QTensor, fits: torch.Tensor, wanted: str) -> FormatError:
    row, col = (int(i) for i in (~fits).nonzero()[0])
    block = q.format.block[1]
    got = f"row {row}, block {col // block} with scale byte {int(q.scale[row, col // block])}"
    return FormatError(f"{q.format.name} does not fit {name} exactly", got=got, wanted=wanted)
