"""SwiGLU with its clamp, and with routing weight and quantiser behind it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, BIG, INF, MANY, NAN, normal, padded
from dsv4.check.cases.norm import DTYPES, FORMATS, TIMED, size_of
from dsv4.check.cases.quantize import searched
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.moe import swiglu, swiglu_quant
from dsv4.quant.formats import Format
from dsv4.quant.tensor import QTensor

FLASH, PRO = 2048, 3072  # widths of an expert
LIMIT = 10.0
NEAR: Bounds = {"f32": Bound("ulp", 8)}
# The definition's exponential overflows where the gate is below -88, and 1e-36 becomes 0.
EXACT: Bounds = {"f32": Bound("ulp", 8, floor=2.0**-100)}
# Where the exponential's last bit turns a rounding to BF16 that lies at a tie of the narrow format: one code further.
CODES: Bounds = {"e4m3": Bound("ulp", 1, share=0.001), "e2m1": Bound("ulp", 1, share=0.001), "global": Bound("ulp", 8)}


def exact(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """In FP64, rounded once."""
    g, u = gate.double(), up.double()
    if limit:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return (g / (1 + torch.exp(-g)) * u).float()


def cases() -> Iterator[Case]:
    yield from _swiglu()
    yield from _swiglu_quant()


def _swiglu() -> Iterator[Case]:
    case = partial(
        Case, op=swiglu, tokens=(0, 1), bounds=NEAR, oracle=lambda given, found: exact(*given), oracle_bounds=EXACT
    )
    for name, dtype in DTYPES.items():
        for tokens, width in ((1, 256), (3, 40), (0, 128), (5, 7), (3, FLASH), (3, PRO)):
            make = partial(_given, tokens, width, dtype, LIMIT)
            yield case(name=f"{tokens} x {width} {name}", make=make, size=size_of(tokens, width))
        yield case(name=f"no limit {name}", make=partial(_given, 3, 264, dtype, 0.0))
        yield case(name=f"extremes {name}", make=partial(_extremes, dtype, LIMIT))
        # Without a limit the FP32 product of two halves may round twice below the normal numbers, and infinity is met.
        yield case(name=f"extremes without limit {name}", make=partial(_extremes, dtype, 0.0), oracle=None)
        yield case(name=f"padded rows {name}", make=partial(_padded, dtype), refusable=True)


def _given(tokens: int, width: int, dtype: torch.dtype, limit: float) -> Arguments:
    gate, up = (normal(name, tokens, width, dtype=dtype, size=5) for name in ("gate", "up"))
    return gate, up, limit


def _padded(dtype: torch.dtype) -> Arguments:
    gate, up, limit = _given(3, 256, dtype, LIMIT)
    return padded(gate), padded(up), limit


def _extremes(dtype: torch.dtype, limit: float) -> Arguments:
    """Every pair of: zeros, the limit and its neighbours, numbers whose exponential over- and underflows, NaN, inf."""
    values = (0.0, -0.0, 9.9375, 10.0, 10.0625, -10.0, -10.0625, 20.0, -80.0, -87.5, -89.0, -100.0, 1e-30, -1e30, 1e30,
              NAN, INF, -INF)  # fmt: skip
    grid = torch.tensor(values)
    up = grid.repeat_interleave(len(values)).view(len(values), -1)
    return grid.repeat(len(values), 1).to(dtype), up.to(dtype), limit


def _swiglu_quant() -> Iterator[Case]:
    case = partial(Case, op=swiglu_quant, bounds=CODES, oracle=_exact_bytes, oracle_bounds=CODES)
    for label, fmt, scale in FORMATS:
        alone = () if scale == "tensor" else (0, 1, 3)
        for tokens, width, name in ((1, 256, "bf16"), (3, 272, "bf16"), (0, 128, "bf16"), (3, FLASH, "bf16"),
                                    (3, PRO, "bf16"), (3, 272, "fp32")):  # fmt: skip
            make = partial(_weighed, tokens, width, DTYPES[name], fmt, scale)
            yield case(name=f"{label} {tokens} x {width} {name}", make=make, tokens=alone, size=size_of(tokens, width))
        make = partial(_weighed, 3, 272, BF16, fmt, scale, False)
        yield case(name=f"{label} without weights", make=make, tokens=() if scale == "tensor" else (0, 1))
        yield case(name=f"{label} odd rows", make=partial(_odd, fmt, scale), tokens=alone)
    for label, fmt, scale in TIMED:
        for tokens, width, bench in ((1, FLASH, "flash"), (MANY, FLASH, "flash"), (1, PRO, "pro"), (MANY, PRO, "pro")):
            make = partial(_weighed, tokens, width, BF16, fmt, scale)
            size, named = size_of(tokens, width, bench), f"{bench} {label}"
            oracle = None if tokens == MANY else _exact_bytes
            yield case(name=f"{named} {tokens}", make=make, tokens=(0, 1, 3), size=size, bench=named, oracle=oracle)
    label, fmt, scale = FORMATS[0]
    make = partial(_weighed, BIG, FLASH, BF16, fmt, scale)
    yield case(name=f"{label} {BIG} x {FLASH}", make=make, tokens=(0, 1, 3), size="big", oracle=None)


def _exact_bytes(given: Arguments, found: Any) -> QTensor:
    """SwiGLU in FP64, rounded; the weighed product, rounded; then the nearest codes by search."""
    gate, up, limit, weight, fmt, *scale = given
    hidden = exact(gate, up, limit) if weight is None else exact(gate, up, limit) * weight.unsqueeze(1)
    return searched(hidden.to(gate.dtype), fmt, *scale)


def _weighed(tokens: int, width: int, dtype: torch.dtype, fmt: Format, scale: Any, weighed: bool = True) -> Arguments:
    weight = normal("route", tokens).abs() if weighed else None
    return (*_given(tokens, width, dtype, LIMIT), weight, fmt, *(() if scale is None else (scale,)))


def _odd(fmt: Format, scale: Any) -> Arguments:
    """A weight of zero, a row of zeros, an infinity, a NaN, and an ordinary row between them."""
    gate, up, limit = _given(5, 272, BF16, LIMIT)
    weight = normal("route", 5).abs()
    weight[0], gate[1], up[2, 100], gate[4, 200] = 0.0, 0.0, INF, NAN
    weight[2] = INF
    return gate, up, limit, weight, fmt, *(() if scale is None else (scale,))
