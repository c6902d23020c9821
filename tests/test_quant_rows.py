"""Activations and cache rows as bytes: what they decode to, and what happens to numbers that cannot be stored."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4.ops.kv import read_kv, write_kv
from dsv4.ops.mhc import Mixer, mhc_post, mhc_post_pre_norm_quant, mhc_pre
from dsv4.ops.moe import swiglu, swiglu_quant
from dsv4.ops.norm import rms_norm, rms_norm_quant, unit_rms
from dsv4.ops.quantize import quantize, quantize_kv
from dsv4.ops.rope import frequencies, q_norm_rope, rope, rotation
from dsv4.quant.activation import fp4_simulate, fp8_simulate
from dsv4.quant.formats import FP8_BLOCK, FP8_ROW, MXFP4, NVFP4, Format, FormatError
from dsv4.quant.kv_rows import KvRow
from dsv4.quant.scaled import nvfp4_global, nvfp4_per_tensor, nvfp4_per_token, nvfp4_simulate
from dsv4.quant.tensor import QTensor
from tests.devices import normal

SIMULATED = {
    "fp8_row": lambda x: fp8_simulate(x, 128),
    "mxfp4": lambda x: fp4_simulate(x, 32),
    "nvfp4": nvfp4_simulate,
}
FORMATS = [FP8_ROW, MXFP4, NVFP4]


def wild(*shape: int) -> torch.Tensor:
    return normal("wild", *shape) * torch.exp2(6 * normal("spread", *shape))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("width", [2, 16, 130, 384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_decode_to_what_the_simulation_says(fmt: Format, width: int, dtype: torch.dtype) -> None:
    x = wild(9, width).type(dtype)
    x[3] = 0
    assert torch.equal(quantize(x, fmt).values().type(dtype), SIMULATED[fmt.name](x))


@pytest.mark.parametrize(("given", "simulated"), [("row", nvfp4_per_token), ("tensor", nvfp4_per_tensor)])
def test_the_global_scale_of_nvfp4_may_be_a_row_s_or_all_rows(given: str, simulated: object) -> None:
    x = wild(7, 64)
    x[2] = 0
    stored = quantize(x, NVFP4, given)  # type: ignore[arg-type]
    assert torch.equal(stored.values(), simulated(x))  # type: ignore[operator]
    assert stored.global_scale is not None
    assert stored.global_scale.shape == ((7, 1) if given == "row" else ())


def test_a_calibrated_global_scale_is_taken_as_it_is() -> None:
    x, scale = wild(7, 64), nvfp4_global(300.0)
    assert torch.equal(quantize(x, NVFP4, scale).values(), nvfp4_simulate(x, scale))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_nan_in_its_own_block_alone(fmt: Format, bad: float) -> None:
    x = normal("x", 3, 256)
    wanted = quantize(x, fmt)
    x[1, 150] = bad
    stored = quantize(x, fmt)
    block = fmt.block[1]
    own = torch.zeros(3, 256, dtype=torch.bool)
    own[1, 150 // block * block : (150 // block + 1) * block] = True
    assert stored.values()[own].isnan().all()
    assert torch.equal(stored.values()[~own], wanted.values()[~own])
    packed = own[:, :: fmt.values_per_byte]
    assert not stored.data.view(torch.uint8)[packed].any()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_no_rows_are_stored_as_none(fmt: Format) -> None:
    for given in (None, "row", "tensor") if fmt is NVFP4 else (None,):
        assert quantize(torch.empty(0, 64), fmt, given).shape == (0, 64)  # type: ignore[arg-type]


def test_what_is_no_format_of_activations_is_refused() -> None:
    with pytest.raises(FormatError, match="no format of activations; got fp8;"):
        quantize(torch.ones(1, 4), FP8_BLOCK)
    with pytest.raises(FormatError, match="mxfp4 cannot pack a row; got 5 values"):
        quantize(torch.ones(1, 5), MXFP4)


# --- fused ops are their parts ---------------------------------------------------------------------------------------


def same(a: QTensor, b: QTensor) -> bool:
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(a.scale, b.scale)


def test_norm_and_quantise() -> None:
    x, weight = normal("x", 5, 256).bfloat16(), normal("w", 256)
    y, stored = rms_norm_quant(x, weight, 1e-6, FP8_ROW)
    assert torch.equal(y, rms_norm(x, weight, 1e-6))
    assert same(stored, quantize(y, FP8_ROW))


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_and_quantise(weighted: bool) -> None:
    gate, up = (20 * normal(name, 5, 256).bfloat16() for name in ("gate", "up"))
    weight = normal("w", 5).abs() if weighted else None
    wide = swiglu(gate, up, 10.0) * (1.0 if weight is None else weight[:, None])
    assert same(swiglu_quant(gate, up, 10.0, weight, MXFP4), quantize(wide.bfloat16(), MXFP4))


def test_query_norm_and_rope() -> None:
    q, turn = normal("q", 5, 4, 96).bfloat16(), rotation(torch.arange(5) * 1000, frequencies(32, 1e4))
    assert torch.equal(q_norm_rope(q, 1e-6, turn), rope(unit_rms(q, 1e-6), turn))


def test_between_two_sublayers() -> None:
    streams, y, weight = normal("s", 5, 4, 64).bfloat16(), normal("y", 5, 64).bfloat16(), normal("w", 64)
    mixer = Mixer(normal("fn", 24, 256, size=0.1), normal("base", 24), torch.ones(24))
    mixed = mhc_pre(streams, mixer, 20, 1e-6, 1e-6)
    new, after, normed, stored = mhc_post_pre_norm_quant(y, mixed, mixer, 20, 1e-6, 1e-6, weight, FP8_ROW)
    assert torch.equal(new, mhc_post(y, mixed))
    assert torch.equal(after.comb, mhc_pre(new, mixer, 20, 1e-6, 1e-6).comb)
    assert torch.equal(normed, rms_norm(after.x, weight, 1e-6))
    assert same(stored, quantize(normed, FP8_ROW))


# --- cache rows ------------------------------------------------------------------------------------------------------


def test_the_row_of_the_released_models_has_584_bytes() -> None:
    row = KvRow(512, 64)
    assert (row.row_bytes, row.blocks, row.scale_bytes) == (576, 7, 8)
    assert row.page_bytes(64) == 576 * 65  # 64 * 584 = 37,376 bytes, up to the next multiple of 576
    assert [row.page_rows(row.page_bytes(n)) for n in range(1, 300)] == list(range(1, 300))


def test_known_bytes_of_a_row() -> None:
    x = torch.zeros(1, 512, dtype=torch.bfloat16)
    x[0, 0], x[0, 1], x[0, 70], x[0, 448], x[0, 511] = 448.0, -1.5, 0.5, 1.0, -2.0
    data, scales = KvRow(512, 64).encode(x)
    assert scales.tolist() == [[127, 127 - 9, 105, 105, 105, 105, 105, 0]]
    stored = data[0].tolist()
    assert (stored[0], stored[1], stored[70]) == (0x7E, 0xBC, 0x78)
    assert stored[448:450] == [0x80, 0x3F]  # BF16 1.0, low byte first
    assert stored[574:576] == [0x00, 0xC0]
    assert sum(map(bool, stored)) == 6


@pytest.mark.parametrize(("dims", "turned"), [(512, 64), (64, 16), (96, 32)])
def test_what_is_written_is_read_back_rounded_as_the_model_rounds_it(dims: int, turned: int) -> None:
    row, count = KvRow(dims, turned), 11
    pages = torch.full((4, row.page_bytes(5) + 3), 0xAA, dtype=torch.uint8)[:, :-3]  # padded pages
    kv, weight = normal("kv", count, dims).bfloat16(), normal("w", dims)
    turn = rotation(torch.arange(count) * 95_000, frequencies(turned, 160_000.0, 16.0, 65_536))
    rows = torch.tensor([0, 19, 4, 5, 7, 12, -1, 3, 9, 10, 17])
    write_kv(kv, weight, 1e-6, turn, pages, rows)
    wanted = quantize_kv(rope(rms_norm(kv, weight, 1e-6), turn), turned)
    wanted[6] = 0
    assert torch.equal(read_kv(pages, rows, dims, turned), wanted)
    touched = 10 * (row.row_bytes + row.scale_bytes)
    assert int((pages != 0xAA).sum()) <= touched
    assert (pages[:, 5 * (row.row_bytes + row.scale_bytes) :] == 0xAA).all()


def test_a_vector_that_is_not_finite_is_read_back_as_nan_and_hurts_no_other() -> None:
    row = KvRow(128, 64)
    pages = torch.zeros(1, row.page_bytes(4), dtype=torch.uint8)
    kv = normal("kv", 2, 128).bfloat16()
    kv[0, 3] = math.nan
    turn = rotation(torch.arange(2), frequencies(64, 1e4))
    write_kv(kv, torch.ones(128), 1e-6, turn, pages, torch.tensor([2, 1]))
    read = read_kv(pages, torch.tensor([2, 1, 0]), 128, 64)
    assert read[0].isnan().all()
    assert read[1].isfinite().all()
    assert not read[2].any()
