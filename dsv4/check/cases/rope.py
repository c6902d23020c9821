"""Rotations, forth and back, and the norm of query heads before them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, BIG, MANY, NAN, normal, padded
from dsv4.check.cases.norm import DTYPES, EPS, size_of
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.norm import unit_rms
from dsv4.ops.rope import Rotation, frequencies, q_norm_rope, rope, rotation

ROTATED = 64
LAST = 1_048_575  # position of the last token that the model takes
# Two numbers that nearly cancel lose the bits of their products: the distance is then that of the pair.
NEAR: Bounds = {"bf16": Bound("ulp", 1, floor=2.0**-22), "f32": Bound("ulp", 4, floor=2.0**-22)}
# A mean that lies at a tie of BF16 turns by the order of its sum, and with it the last bit of a whole head.
NEAR_HEADS: Bounds = {"bf16": Bound("ulp", 2, share=0.02, floor=2.0**-7), "f32": Bound("ulp", 8, floor=2.0**-21)}


def turn(tokens: int, dims: int = ROTATED, yarn: bool = True) -> Rotation:
    """The rotations of positions between 0 and the last, both among them."""
    known = torch.tensor([0, LAST, 1, 65_535, 65_536, 999_983])
    steps = torch.arange(tokens) * 7919 % (LAST + 1)
    positions = torch.cat((known, steps))[:tokens]
    return rotation(positions, frequencies(dims, 160000.0, 16.0, 65536) if yarn else frequencies(dims, 10000.0))


def turned(x: Tensor, by: Rotation, inverse: bool = False) -> Tensor:
    """In complex numbers of FP64, rounded once to x's dtype."""
    dims = by.cos.shape[-1]
    shape = (len(x), *(1 for _ in x.shape[1:-1]), dims // 2)
    angle = torch.complex(by.cos[:, ::2].double(), by.sin[:, 1::2].double()).view(shape)
    tail = torch.view_as_complex(x[..., -dims:].double().unflatten(-1, (dims // 2, 2)).contiguous())
    out = torch.view_as_real(tail * (angle.conj() if inverse else angle)).flatten(-2)
    return torch.cat((x[..., :-dims], out.to(x.dtype)), -1)


def cases() -> Iterator[Case]:
    yield from _rope()
    yield from _q_norm_rope()


def _rope() -> Iterator[Case]:
    case = partial(
        Case, op=rope, tokens=(0, 1), bounds=NEAR, oracle=lambda given, found: turned(*given), oracle_bounds=NEAR
    )
    shapes = ((1, 512), (3, 2, 128), (0, 64, 512), (7, 64), (3, 64, 512), (3, 128, 512), (9, 512))
    for name, dtype in DTYPES.items():
        for shape in shapes:
            size = size_of(shape[0], shape[1] * (shape[2] if len(shape) == 3 else 1))
            for yarn in (True, False):
                for inverse in (False, True):
                    make = partial(_given, shape, dtype, yarn, inverse)
                    label = f"{' x '.join(map(str, shape))} {name}{'' if yarn else ' plain'}{' back' * inverse}"
                    yield case(name=label, make=make, size=size)
        yield case(name=f"few dimensions {name}", make=partial(_given, (3, 24), dtype, True, False, 8), refusable=True)
        yield case(name=f"padded heads {name}", make=partial(_padded, dtype), refusable=True)
    yield case(name="a NaN stays with its pair", make=_with_nan)
    for tokens in (1, MANY):
        for bench, heads in (("flash", 64), ("pro", 128)):
            make = partial(_given, (tokens, heads, 512), BF16, True, False)
            yield case(name=f"{bench} {tokens}", make=make, size=size_of(tokens, 512 * heads, bench), bench=bench)
    yield case(name=f"{BIG} x 512", make=partial(_given, (BIG, 512), BF16, True, False), size="big", oracle=None)


def _given(shape: tuple[int, ...], dtype: torch.dtype, yarn: bool, inverse: bool, dims: int = ROTATED) -> Arguments:
    return normal("x", *shape, dtype=dtype), turn(shape[0], dims, yarn), inverse


def _padded(dtype: torch.dtype) -> Arguments:
    return padded(normal("x", 3, 4, 128, dtype=dtype)), turn(3), False


def _with_nan() -> Arguments:
    x = normal("x", 3, 2, 128, dtype=BF16)
    x[1, 0, 70] = NAN
    return x, turn(3), False


def _q_norm_rope() -> Iterator[Case]:
    case = partial(
        Case, op=q_norm_rope, tokens=(0, 2), bounds=NEAR_HEADS, oracle=_exact_heads, oracle_bounds=NEAR_HEADS
    )
    for name, dtype in DTYPES.items():
        for shape in ((1, 2, 128), (3, 3, 192), (0, 64, 512), (3, 64, 512), (3, 128, 512)):
            make = partial(_heads, shape, dtype)
            size = size_of(shape[0], shape[1] * shape[2])
            yield case(name=f"{' x '.join(map(str, shape))} {name}", make=make, size=size)
    for tokens in (1, MANY):
        for bench, heads in (("flash", 64), ("pro", 128)):
            make = partial(_heads, (tokens, heads, 512), BF16)
            yield case(name=f"{bench} {tokens}", make=make, size=size_of(tokens, 512 * heads, bench), bench=bench)


def _heads(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    return normal("q", *shape, dtype=dtype, size=2), EPS, turn(shape[0])


def _exact_heads(given: Arguments, found: Any) -> Tensor:
    q, eps, by = given
    return turned(unit_rms(q, eps), by)
