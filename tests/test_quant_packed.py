"""Experts in the order of the tensor cores: there and back, and what the bytes mean, read by another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.check.cases.expert_matrices import matrix, of_format
from dsv4.ops.experts import store_experts, stored_expert
from dsv4.ops.moe import Expert
from dsv4.quant.e2m1 import VALUES
from dsv4.quant.formats import FP8_BLOCK, FP8_BLOCK_F32, FP8_ROW, MXFP4, NVFP4, Format, FormatError
from dsv4.quant.packed import COLUMNS, PACKED, ROWS, Packed, pack, tile_bytes, unpack, values
from dsv4.quant.packed_formats import NV_TOP
from dsv4.quant.tensor import QTensor


def equal(a: QTensor, b: QTensor) -> bool:
    same = torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(
        a.scale.view(torch.uint8), b.scale.view(torch.uint8)
    )
    return same and a.format is b.format and (a.global_scale is None or bool(a.global_scale == b.global_scale))


def any_scales(rows: int, columns: int, fmt: Format, seed: int) -> QTensor:
    """Every byte, so that tiles stand apart."""
    draw = torch.Generator().manual_seed(seed)
    q = of_format("any", rows, columns, fmt)
    if fmt is not FP8_BLOCK_F32:
        q.scale.view(torch.uint8).copy_(torch.randint(0, 256, q.scale.shape, generator=draw))
    return q


@pytest.mark.parametrize("fmt", PACKED)
@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (512, 384), (768, 256)])
def test_packing_loses_nothing(rows: int, columns: int, fmt: Format, seed: int) -> None:
    for q in (of_format("m", rows, columns, fmt), any_scales(rows, columns, fmt, seed)):
        packed = pack(q)
        assert packed.shape == (rows, columns)
        assert packed.tiles.shape == (rows // ROWS, columns // COLUMNS, tile_bytes(fmt))
        assert equal(unpack(packed)[0], q)
    low = matrix("m", rows, columns, 0, 15)
    assert equal(unpack(pack(low))[0], low)


@pytest.mark.parametrize("fmt", PACKED)
def test_two_matrices_alternate_and_come_back(fmt: Format) -> None:
    one, two = (of_format(name, 256, 256, fmt) for name in "ab")
    packed = pack(one, two)
    assert all(equal(a, b) for a, b in zip(unpack(packed), (one, two), strict=True))
    assert torch.equal(values(packed)[::2], one.values())
    assert torch.equal(values(packed)[1::2], two.values())


def test_odd_scales_of_nvfp4_come_back() -> None:
    """Zeros, subnormal ones, global scales that are tiny, zero and infinite."""
    q = of_format("m", 256, 256, NVFP4)
    q.scale.view(torch.uint8)[:128] = torch.arange(128, dtype=torch.uint8).view(-1, 1)
    for total in (1.0, 2.0**-120, 2.0**-140, 0.0, float("inf")):
        given = QTensor(q.data, q.scale, NVFP4, torch.tensor(total))
        assert equal(unpack(pack(given))[0], given)


def value(packed: Packed, row: int, column: int) -> float:
    """One number, by the diagrams of dsv4/quant/packed_formats.py and nothing else."""
    quarter_bytes = tile_bytes(packed.format) // 4
    tile = packed.tiles[row // ROWS, column // COLUMNS]
    quarter = tile[quarter_bytes * (row % ROWS // 64) :][:quarter_bytes].tolist()
    r, c = row % 64, column % COLUMNS
    warp, g, h, t, j = r // 16, r % 16 // 2, r % 2, c // 32, c % 8
    apart = bool(packed.apart[row // ROWS])
    if packed.format in (FP8_BLOCK, FP8_BLOCK_F32):
        byte = quarter[((((warp * 2 + h) * 2 + c % 32 // 16) * 8 + g) * 4 + t) * 16 + c % 16]
        scale = _float(quarter, 8192 + 4 * h)
        return float(torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * scale)
    word = _word(quarter, (((warp * 2 + h) * 8 + g) * 4 + t) * 16 + c % 32 // 8 * 4)
    sign = word >> (8 * j + 7 if j < 4 else 8 * (j - 4) + 3) & 1
    code = float((-1) ** sign * VALUES[word >> 4 * j & 7])
    if packed.format is NVFP4:
        index = quarter[4096 + (((warp * 8 + g) * 4 + t) * 2 + h) * 2 + c % 32 // 16]
        common = _float(quarter, 4096 + 512 + 4 * r)
        if apart:
            return float(torch.tensor(index, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * code * common)
        return float(torch.tensor((1 + index % 8 / 8) * 2.0 ** (index // 8 - 5) * code) * common)
    if apart:
        return code * 2.0 ** (quarter[4096 + 4 * r + t] - 127)
    scales = _word(quarter, 4096 + 4 * r)
    return code * 2.0 ** ((scales >> 23 & 255) - 127 + (scales >> 4 * t & 15) - 8)


def _word(data: list[int], at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _float(data: list[int], at: int) -> Tensor:
    return torch.tensor(data[at : at + 4], dtype=torch.uint8).view(torch.float32)[0]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("fmt", PACKED)
def test_the_diagram_says_what_the_bytes_are(fmt: Format, apart: bool) -> None:
    q = of_format("m", 512, 256, fmt)
    fp4 = fmt in (MXFP4, NVFP4)
    if apart and fp4:
        q.scale.view(torch.uint8)[300, 5] = 140 if fmt is MXFP4 else 1
        q.scale.view(torch.uint8)[300, 6] = 120
    packed, wanted = pack(q), q.values()
    assert packed.apart.tolist() == [0, int(apart and fp4)]
    draw = torch.Generator().manual_seed(1)
    places = torch.stack([torch.randint(0, size, (3000,), generator=draw) for size in q.shape], 1).tolist()
    assert [value(packed, row, column) for row, column in places] == [float(wanted[r, c]) for r, c in places]


def scales(*of_a_row: int) -> Tensor:
    return torch.tensor(of_a_row, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("row", "apart"),
    [
        (scales(120, 120, 120, 120), 0),
        (scales(106, 120, 113, 119), 0),  # 2^14 apart
        (scales(105, 120, 113, 119), 1),
        (scales(254, 240, 250, 251), 0),
        (scales(0, 7, 3, 1), 0),
        (scales(0, 14, 3, 1), 0),
        (scales(0, 15, 3, 1), 1),
        (scales(120, 255, 120, 120), 1),  # NaN
    ],
)
def test_which_scales_stand_apart(row: Tensor, apart: int) -> None:
    """Steps of 0 to 14, whatever the base; it is at least 1, for FP32 has no normal number at 0."""
    q = matrix("m", 256, 128)
    q.scale[77] = row
    packed = pack(q)
    assert packed.apart.tolist() == [apart]
    assert equal(unpack(packed)[0], q)
    if not apart:
        word = int(packed.tiles[0, 0, 4352 + 4096 :].clone()[:256].view(torch.int32)[77 - 64])
        assert all(0 <= word >> 4 * t & 15 <= 14 for t in range(4))
        assert 1 <= word >> 23 <= 254
        assert not word & 0x7F0000


def test_steps_are_exact_in_e4m3() -> None:
    """The table that a kernel widens by: every code at every step is an E4M3 number."""
    for step in range(15):
        values = torch.tensor(VALUES) * 2.0 ** (step - 8)
        assert torch.equal(values.to(torch.float8_e4m3fn).float(), values)
    assert float((torch.tensor(VALUES) * 2.0**7).to(torch.float8_e4m3fn).float().max()) != 6 * 2.0**7


def test_a_code_times_a_scale_is_the_sum_of_two_e4m3_numbers() -> None:
    """At every step and mantissa of NVFP4's table: the first four bits, and what they leave."""
    for index in range(8 * (NV_TOP + 1)):
        whole = torch.tensor(VALUES) * (1 + index % 8 / 8) * 2.0 ** (index // 8 - 5)
        head = (whole.view(torch.int32) & ~0xFFFFF).view(torch.float32)
        for part in (head, whole - head):
            assert torch.equal(part.to(torch.float8_e4m3fn).float(), part)


@pytest.mark.parametrize(
    "q",
    [
        FP8_BLOCK.encode(torch.ones(128, 128)),
        matrix("m", 128, 128),
        matrix("m", 256, 64),
        FP8_ROW.encode(torch.ones(256, 128)),
    ],
)
def test_what_cannot_be_packed_is_refused(q: QTensor) -> None:
    with pytest.raises(FormatError, match="cannot be packed"):
        pack(q)


def test_matrices_that_are_not_alike_do_not_alternate() -> None:
    for other in (matrix("m", 256, 128), of_format("m", 128, 128, NVFP4)):
        with pytest.raises(FormatError, match="cannot be packed"):
            pack(matrix("m", 128, 128), other)


@pytest.mark.parametrize("fmt", PACKED)
def test_experts_come_back_as_they_were(fmt: Format) -> None:
    shapes = {"w1": (128, 256), "w3": (128, 256), "w2": (256, 128)}
    experts = [Expert(*(of_format(f"{name} {n}", *shape, fmt) for name, shape in shapes.items())) for n in range(3)]
    shared = Expert(*(of_format(f"{name} shared", *shape, FP8_BLOCK) for name, shape in shapes.items()))
    stored = store_experts(experts, shared)
    assert stored.routed.up.tiles.shape == (3, 1, 2, tile_bytes(fmt))
    for number, one in enumerate([*experts, shared]):
        assert all(equal(a, b) for a, b in zip(stored_expert(stored, number), one, strict=True))  # type: ignore[arg-type]
