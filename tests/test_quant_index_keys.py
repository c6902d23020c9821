"""Index vectors as bytes: known ones, what they decode to, pages, and numbers that cannot be stored."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4.ops.quantize import hadamard, quantize_index
from dsv4.quant.activation import fp8_simulate
from dsv4.quant.index_keys import FP4_KEYS, FP8_KEYS, KEY_LAYOUTS, KeyLayout
from dsv4.quant.paged import spans
from tests.devices import normal

BOTH = pytest.mark.parametrize("layout", KEY_LAYOUTS.values(), ids=lambda one: one.name)


def test_a_key_has_68_or_132_bytes() -> None:
    assert (FP4_KEYS.page_bytes(32), FP8_KEYS.page_bytes(32)) == (32 * 68, 32 * 132)
    assert (FP4_KEYS.page_bytes(5), FP8_KEYS.page_bytes(5)) == (352, 672)  # 340 and 660, up to the next 16
    for layout in KEY_LAYOUTS.values():
        assert [layout.page_rows(layout.page_bytes(n)) for n in range(1, 300)] == list(range(1, 300))


def test_known_bytes_of_fp4() -> None:
    x = torch.zeros(1, 128)
    x[0, 0], x[0, 1], x[0, 31], x[0, 32], x[0, 127] = 6.0, -0.5, 1.5, 24.0, -3 * 2.0**-9
    data, scales = FP4_KEYS.encode(x)
    # Largest 6 -> 2^0; 24 -> 2^2; none: the least, 2^-126; 3 * 2^-9 -> 2^-10.
    assert scales.tolist() == [[127, 129, 1, 117]]
    assert (data[0, 0], data[0, 15], data[0, 16], data[0, 63]) == (0x97, 0x30, 0x07, 0xF0)
    assert int((data != 0).sum()) == 4
    assert torch.equal(FP4_KEYS.decode(data, scales), x)


def test_known_bytes_of_fp8() -> None:
    x = torch.zeros(1, 128)
    x[0, 0], x[0, 1], x[0, 127] = 896.0, -3.0, 2.0
    data, scales = FP8_KEYS.encode(x)
    assert scales.tolist() == [[0, 0, 0, 0x40]]  # 2.0
    assert (data[0, 0], data[0, 1], data[0, 127]) == (0x7E, 0xBC, 0x38)  # 448, -1.5, 1
    assert torch.equal(FP8_KEYS.decode(data, scales), x)
    assert FP8_KEYS.decode(data, torch.tensor([[0x00, 0x00, 0x40, 0x3F]], dtype=torch.uint8))[0, 0] == 336  # * 0.75


def test_bytes_decode_to_what_the_model_rounds_to() -> None:
    x = (normal("x", 7, 3, 128) * torch.exp2(6 * normal("spread", 7, 3, 128))).bfloat16()
    x[2, 1] = 0
    assert torch.equal(FP4_KEYS.decode(*FP4_KEYS.encode(hadamard(x))).bfloat16(), quantize_index(x))
    assert torch.equal(FP8_KEYS.decode(*FP8_KEYS.encode(x)).bfloat16(), fp8_simulate(x, 128))


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_nan_in_its_own_block_alone(layout: KeyLayout, bad: float) -> None:
    x = normal("x", 3, 128)
    wanted = layout.decode(*layout.encode(x))
    x[1, 70] = bad
    data, scales = layout.encode(x)
    own = torch.zeros(3, 128, dtype=torch.bool)
    own[1, 70 // layout.block * layout.block : (70 // layout.block + 1) * layout.block] = True
    read = layout.decode(data, scales)
    assert read[own].isnan().all()
    assert torch.equal(read[~own], wanted[~own])
    assert not layout.codes(data)[own].any()


@BOTH
def test_a_page_is_numbers_then_scales(layout: KeyLayout) -> None:
    pages = torch.zeros(3, layout.page_bytes(32), dtype=torch.uint8)
    page, data, scale = spans(layout, pages, torch.tensor([0, 31, 32, 95]))
    assert page.tolist() == [0, 0, 1, 2]
    assert data.tolist() == [0, 31 * layout.data_bytes, 0, 31 * layout.data_bytes]
    assert scale.tolist() == [32 * layout.data_bytes + 4 * n for n in (0, 31, 0, 31)]


@BOTH
def test_no_vectors_are_stored_as_none(layout: KeyLayout) -> None:
    data, scales = layout.encode(torch.empty(0, 64, 128))
    assert (data.shape, scales.shape) == ((0, 64, layout.data_bytes), (0, 64, 4))
    assert layout.decode(data, scales).shape == (0, 64, 128)
