"""The element formats: every code of E4M3, E2M1 and UE8M0 against definitions written out here in plain Python."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4.quant import e2m1, e4m3
from dsv4.quant.e8m0 import ue8m0_decode, ue8m0_encode_ceil

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def e4m3_value(code: int) -> float:
    sign, exponent, mantissa = (-1.0 if code & 128 else 1.0), (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1_value(code: int) -> float:
    sign, exponent, mantissa = (-1.0 if code & 8 else 1.0), (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def nearest_even(x: float, positive: list[float]) -> int:
    """Code of the nearest of `positive` (ascending, indexed by code) to |x|; the even code of two equally near."""
    target = min(Fraction(abs(x)), Fraction(positive[-1]))
    return min(range(len(positive)), key=lambda c: (abs(Fraction(positive[c]) - target), c % 2))


E4M3 = [e4m3_value(c) for c in range(127)]
E2M1 = [e2m1_value(c) for c in range(8)]


def probes(positive: list[float]) -> list[float]:
    """Every value, every midpoint and its FP32 neighbours on both sides, of both signs, and numbers past the end."""
    middles = [(a + b) / 2 for a, b in pairwise(positive)]
    points = torch.tensor(positive + middles + [positive[-1] * f for f in (1.01, 1.04, 1.1, 2, 1e30)])
    around = [torch.nextafter(points, torch.tensor(end)) for end in (-math.inf, math.inf)]
    every = torch.cat([points, *around])
    return torch.cat([every, -every]).tolist()


def test_e4m3_decodes_all_256_codes() -> None:
    got = e4m3.e4m3_decode(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn))
    torch.testing.assert_close(got, torch.tensor([e4m3_value(c) for c in range(256)]), rtol=0, atol=0, equal_nan=True)
    assert got[128].signbit()


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    xs = probes(E4M3)
    got = e4m3.e4m3_encode(torch.tensor(xs)).view(torch.uint8).tolist()
    assert got == [nearest_even(x, E4M3) | (128 if math.copysign(1, x) < 0 else 0) for x in xs]


def test_e4m3_known_bytes() -> None:
    xs = torch.tensor([0.0, -0.0, 1.0, -1.5, 448.0, 1e9, -math.inf, 2.0**-9, 2.0**-10, 0.0146484375, 2.0**-6])
    want = [0x00, 0x80, 0x38, 0xBC, 0x7E, 0x7E, 0xFE, 0x01, 0x00, 0x08, 0x08]
    assert e4m3.e4m3_encode(xs).view(torch.uint8).tolist() == want
    assert e4m3.e4m3_encode(torch.tensor([math.nan])).float().isnan().all()


@given(st.lists(floats, min_size=1, max_size=64))
def test_e4m3_of_any_float(xs: list[float]) -> None:
    got = e4m3.e4m3_encode(torch.tensor(xs)).view(torch.uint8) & 127
    assert got.tolist() == [nearest_even(x, E4M3) for x in xs]


def test_e2m1_decodes_all_16_codes() -> None:
    got = e2m1.e2m1_decode(torch.arange(16, dtype=torch.uint8))
    assert got.tolist() == [e2m1_value(c) for c in range(16)]
    assert got[8].signbit()


def test_e2m1_ties_go_to_the_even_code() -> None:
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4}
    xs = torch.tensor(list(ties))
    assert e2m1.e2m1_round(xs).tolist() == list(ties.values())
    assert e2m1.e2m1_round(-xs).tolist() == [-v for v in ties.values()]


def test_e2m1_rounds_and_encodes_every_probe() -> None:
    xs = probes(E2M1)
    want = [nearest_even(x, E2M1) | (8 if math.copysign(1, x) < 0 else 0) for x in xs]
    assert e2m1.e2m1_encode(torch.tensor(xs)).tolist() == want
    rounded = e2m1.e2m1_round(torch.tensor(xs))
    assert torch.equal(rounded.view(torch.int32), torch.tensor([e2m1_value(c) for c in want]).view(torch.int32))


@given(st.lists(floats, min_size=1, max_size=64))
def test_e2m1_of_any_float(xs: list[float]) -> None:
    assert [c & 7 for c in e2m1.e2m1_encode(torch.tensor(xs)).tolist()] == [nearest_even(x, E2M1) for x in xs]


def test_nan_stays_nan_when_rounded_to_e2m1() -> None:
    assert e2m1.e2m1_round(torch.tensor([math.nan])).isnan().all()


def test_packing_puts_the_even_element_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert e2m1.pack(codes).tolist() == [[0x21, 0x0F]]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(e2m1.pack(e2m1.unpack(every)), every)
    assert torch.equal(e2m1.unpack(every.view(torch.int8)), e2m1.unpack(every))


def test_ue8m0_decodes_all_256_bytes() -> None:
    got = ue8m0_decode(torch.arange(256, dtype=torch.uint8)).tolist()
    assert got[:255] == [math.ldexp(1.0, b - 127) for b in range(255)]
    assert math.isnan(got[255])


def test_ue8m0_encodes_its_own_values_and_rounds_up_between_them() -> None:
    powers = ue8m0_decode(torch.arange(255, dtype=torch.uint8))
    assert ue8m0_encode_ceil(powers).tolist() == list(range(255))
    above = torch.nextafter(powers, torch.tensor(math.inf))
    assert ue8m0_encode_ceil(above).tolist() == [*range(1, 255), 254]
    below = torch.nextafter(powers, torch.tensor(0.0))
    assert ue8m0_encode_ceil(below).tolist() == list(range(255))


@pytest.mark.parametrize(
    ("x", "byte"), [(0.0, 0), (-0.0, 0), (math.nan, 255), (math.inf, 255), (-1.0, 255), (1.0, 127)]
)
def test_ue8m0_edges(x: float, byte: int) -> None:
    assert ue8m0_encode_ceil(torch.tensor([x])).tolist() == [byte]


def test_ue8m0_bytes_are_never_taken_from_another_dtype() -> None:
    with pytest.raises(AssertionError, match="uint8"):
        ue8m0_decode(torch.tensor([127.0]))
