"""RMSNorm, the norm of query heads, and RMSNorm with the quantiser behind it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, BIG, FLASH, FP32, INF, MANY, NAN, PRO, norm_weight, normal, padded, sparse
from dsv4.check.contract import Arguments, Case, Size
from dsv4.check.metrics import EXACT, Bound, Bounds
from dsv4.ops.norm import rms_norm, rms_norm_quant, unit_rms
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import FP8_ROW, MXFP4, NVFP4, Format

EPS = 1e-6
# What activations are stored as: label, format, global scale.
FORMATS: tuple[tuple[str, Format, Any], ...] = (
    ("fp8", FP8_ROW, None),
    ("mxfp4", MXFP4, None),
    ("nvfp4", NVFP4, None),
    ("nvfp4 calibrated", NVFP4, torch.tensor(0.0123)),
    ("nvfp4 by row", NVFP4, "row"),
    ("nvfp4 by tensor", NVFP4, "tensor"),
)
TIMED = tuple(one for one in FORMATS if one[0] in ("fp8", "mxfp4", "nvfp4 by row"))
NEAR: Bounds = {"bf16": Bound("ulp", 1, share=0.01), "f32": Bound("ulp", 8)}
DTYPES = {"bf16": BF16, "fp32": FP32}


def size_of(tokens: int, width: int, bench: str = "") -> Size:
    """By the numbers in a case. Of those that are timed with many tokens, Flash's are judged as well."""
    if tokens == MANY and bench == "pro":
        return "timed"
    return "small" if tokens * width <= 4096 else "full" if tokens <= MANY // 2 else "big"


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """FP64, rounded to x's dtype. Squares beyond FP32's range overflow as they do there."""
    mean = x.float().square().double().mean(-1, keepdim=True) if x.shape[-1] else x.double()
    mean = torch.where(mean > torch.finfo(FP32).max, INF, mean)
    return (weight.double() * (x.double() / (mean + eps).sqrt())).to(x.dtype)


def exact_unit(x: Tensor, eps: float) -> Tensor:
    """Rounded to x's dtype after square, mean, sum with eps, root and product; the mean in FP64."""
    mean = x.square().double().mean(-1, keepdim=True).to(x.dtype)
    return x * (1 / (mean + eps).double().sqrt()).to(x.dtype)


def odd_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Zeros, equal numbers, tiny, subnormal and large ones, one NaN, one infinity, and an ordinary row between them."""
    base = normal("odd rows", width)
    nan, infinite = base.clone(), base.clone()
    nan[width // 2], infinite[width // 3] = NAN, INF
    rows = (0 * base, torch.ones(width), base * 1e-20, base * 2.0**-130, nan, base, infinite, base * 1e18)
    return torch.stack(rows).to(dtype)


def _norm(x: Tensor) -> Arguments:
    return x, norm_weight(x.shape[-1]), EPS


def cases() -> Iterator[Case]:
    yield from _rms_norm()
    yield from _unit_rms()
    yield from _rms_norm_quant()


def _rms_norm() -> Iterator[Case]:
    case = partial(
        Case, op=rms_norm, tokens=(0,), bounds=NEAR, oracle=lambda given, found: exact_norm(*given), oracle_bounds=NEAR
    )
    for name, dtype in DTYPES.items():
        for tokens, width in ((1, 256), (3, 200), (0, 512), (3, 1), (17, 1024), (3, FLASH), (3, PRO), (1, 16384)):
            make = partial(_shaped, tokens, width, dtype)
            yield case(name=f"{tokens} x {width} {name}", make=make, size=size_of(tokens, width))
        yield case(name=f"odd rows {name}", make=partial(_odd, 264, dtype))
        yield case(name=f"padded rows {name}", make=partial(_strided, padded, dtype), refusable=True)
        yield case(name=f"every other number {name}", make=partial(_strided, sparse, dtype), refusable=True)
    yield case(name="zero weights", make=lambda: (normal("x", 2, 256, dtype=BF16), torch.zeros(256), EPS))
    for tokens, width, bench in ((1, FLASH, "flash"), (MANY, FLASH, "flash"), (1, PRO, "pro"), (MANY, PRO, "pro")):
        make = partial(_shaped, tokens, width, BF16)
        yield case(name=f"{bench} {tokens}", make=make, size=size_of(tokens, width, bench), bench=bench)
    yield case(name=f"{BIG} x {FLASH} bf16", make=partial(_shaped, BIG, FLASH, BF16), size="big", oracle=None)


def _shaped(tokens: int, width: int, dtype: torch.dtype) -> Arguments:
    return _norm(normal("x", tokens, width, dtype=dtype, size=3))


def _odd(width: int, dtype: torch.dtype) -> Arguments:
    return _norm(odd_rows(width, dtype))


def _strided(layout: Any, dtype: torch.dtype) -> Arguments:
    return _norm(layout(normal("x", 3, 256, dtype=dtype)))


def _unit_rms() -> Iterator[Case]:
    # A mean that lies at a tie of BF16 turns by the order of its sum, and with it the last bit of a whole head.
    bounds: Bounds = {"bf16": Bound("ulp", 2, share=0.02), "f32": Bound("ulp", 8)}
    case = partial(
        Case, op=unit_rms, tokens=(0,), bounds=bounds, oracle=lambda g, found: exact_unit(*g), oracle_bounds=bounds
    )
    shapes = ((1, 2, 128), (3, 3, 40), (0, 64, 512), (3, 64, 512), (1, 128, 512))
    for name, dtype in DTYPES.items():
        for shape in shapes:
            make = partial(_heads, shape, dtype)
            size = size_of(shape[0], shape[1] * shape[2])
            yield case(name=f"{' x '.join(map(str, shape))} {name}", make=make, size=size)
        yield case(name=f"odd rows {name}", make=partial(_odd_heads, dtype))


def _heads(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    return normal("q", *shape, dtype=dtype, size=2), EPS


def _odd_heads(dtype: torch.dtype) -> Arguments:
    return odd_rows(64, dtype).unsqueeze(1), EPS


def then_quantized(given: Arguments, found: Any) -> Any:
    """The norm by its reference, and the bytes that the quantiser's reference makes of the norm that was found."""
    x, weight, eps, fmt, *scale = given
    return rms_norm(x, weight, eps), quantize(found[0], fmt, *scale)


def _rms_norm_quant() -> Iterator[Case]:
    bounds = {**NEAR, "1.global": EXACT}
    case = partial(Case, op=rms_norm_quant, tokens=(0,), bounds=bounds, wanted=then_quantized)
    for label, fmt, scale in FORMATS:
        rest = () if scale is None else (scale,)
        for tokens, width, name in ((1, 256, "bf16"), (3, 336, "bf16"), (0, 512, "bf16"), (3, FLASH, "bf16"),
                                    (3, PRO, "bf16"), (3, 272, "fp32"), (2, FLASH, "fp32")):  # fmt: skip
            make = partial(_fused, tokens, width, DTYPES[name], fmt, rest)
            given = () if scale == "tensor" else (0,)
            yield case(name=f"{label} {tokens} x {width} {name}", make=make, size=size_of(tokens, width), tokens=given)
        if scale != "tensor":
            make = partial(_odd_fused, BF16, fmt, rest)
            yield case(name=f"{label} odd rows", make=make)
    for label, fmt, scale in TIMED:
        rest = () if scale is None else (scale,)
        for tokens, width, bench in ((1, FLASH, "flash"), (MANY, FLASH, "flash"), (1, PRO, "pro"), (MANY, PRO, "pro")):
            make = partial(_fused, tokens, width, BF16, fmt, rest)
            yield case(
                name=f"{label} {bench} {tokens}",
                make=make,
                size=size_of(tokens, width, bench),
                bench=f"{bench} {label}",
            )
    make = partial(_fused, BIG, FLASH, BF16, FP8_ROW, ())
    yield case(name=f"fp8 {BIG} x {FLASH}", make=make, size="big")


def _fused(tokens: int, width: int, dtype: torch.dtype, fmt: Format, scale: tuple[Any, ...]) -> Arguments:
    return (*_shaped(tokens, width, dtype), fmt, *scale)


def _odd_fused(dtype: torch.dtype, fmt: Format, scale: tuple[Any, ...]) -> Arguments:
    return (*_odd(336, dtype), fmt, *scale)
