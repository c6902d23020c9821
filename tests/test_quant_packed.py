"""MXFP4 in the order of the tensor cores: there and back, and what the bytes mean, read by another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.check.cases.experts import matrix
from dsv4.ops.experts import store_experts, stored_expert
from dsv4.ops.moe import Expert
from dsv4.quant.e2m1 import VALUES
from dsv4.quant.formats import FP8_BLOCK, MXFP4, FormatError
from dsv4.quant.packed import COLUMNS, DATA_BYTES, ROWS, TILE_BYTES, Packed, pack, unpack
from dsv4.quant.tensor import QTensor


def equal(a: QTensor, b: QTensor) -> bool:
    return torch.equal(a.data, b.data) and torch.equal(a.scale, b.scale) and a.format is b.format


def any_scales(rows: int, columns: int, seed: int) -> QTensor:
    """Every byte, so that tiles stand apart."""
    draw = torch.Generator().manual_seed(seed)
    q = matrix("any", rows, columns)
    scale = torch.randint(0, 256, q.scale.shape, generator=draw, dtype=torch.uint8)
    return QTensor(q.data, scale, MXFP4)


@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (512, 384), (768, 256)])
def test_packing_loses_nothing(rows: int, columns: int, seed: int) -> None:
    for q in (matrix("m", rows, columns), matrix("m", rows, columns, 0, 15), any_scales(rows, columns, seed)):
        packed = pack(q)
        assert packed.shape == (rows, columns)
        assert packed.tiles.shape == (rows // ROWS, columns // COLUMNS, TILE_BYTES)
        assert equal(unpack(packed), q)


def value(packed: Packed, row: int, column: int) -> float:
    """One number, by the diagram of dsv4/quant/packed.py and nothing else."""
    tile = packed.tiles[row // ROWS, column // COLUMNS].tolist()
    r, c = row % ROWS, column % COLUMNS
    warp, g, half, block, j = r // 16, r % 16 // 2, r % 2, c // 32, c % 8
    at = (((warp * 2 + half) * 8 + g) * 4 + block) * 16 + c % 32 // 8 * 4
    word = int.from_bytes(tile[at : at + 4], "little")
    sign = word >> (8 * j + 7 if j < 4 else 8 * (j - 4) + 3) & 1
    scales = tile[DATA_BYTES + 4 * r : DATA_BYTES + 4 * r + 4]
    if packed.apart[row // ROWS]:
        power = scales[block] - 127
    else:
        word_of_scales = int.from_bytes(scales, "little")
        power = (word_of_scales >> 23 & 255) - 127 + (word_of_scales >> 4 * block & 15) - 8
    return float((-1) ** sign * VALUES[word >> 4 * j & 7] * 2.0**power)


@pytest.mark.parametrize("apart", [False, True])
def test_the_diagram_says_what_the_bytes_are(apart: bool) -> None:
    q = matrix("m", 512, 256)
    if apart:
        q.scale[300, 5] = 140
    packed, wanted = pack(q), q.values()
    assert packed.apart.tolist() == [0, int(apart)]
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
    assert equal(unpack(packed), q)
    if not apart:
        word = int(packed.tiles[0, 0, DATA_BYTES:].clone().view(torch.int32)[77])
        assert all(0 <= word >> 4 * t & 15 <= 14 for t in range(4))
        assert 1 <= word >> 23 <= 254
        assert not word & 0x7F0000


def test_steps_are_exact_in_e4m3() -> None:
    """The table that a kernel widens by: every code at every step is an E4M3 number."""
    for step in range(15):
        values = torch.tensor(VALUES) * 2.0 ** (step - 8)
        assert torch.equal(values.to(torch.float8_e4m3fn).float(), values)
    assert float((torch.tensor(VALUES) * 2.0**7).to(torch.float8_e4m3fn).float().max()) != 6 * 2.0**7


@pytest.mark.parametrize("q", [FP8_BLOCK.encode(torch.ones(256, 128)), matrix("m", 128, 128), matrix("m", 256, 64)])
def test_what_cannot_be_packed_is_refused(q: QTensor) -> None:
    with pytest.raises(FormatError, match="cannot be packed"):
        pack(q)


def test_experts_come_back_as_they_were() -> None:
    shapes = {"w1": (128, 256), "w3": (128, 256), "w2": (256, 128)}
    experts = [Expert(*(matrix(f"{name} {n}", *shape) for name, shape in shapes.items())) for n in range(3)]
    stored = store_experts(experts)
    assert stored.up.tiles.shape == (3, 1, 2, TILE_BYTES)
    for number, one in enumerate(experts):
        assert all(equal(a, b) for a, b in zip(stored_expert(stored, number), one, strict=True))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="float32; wanted mxfp4"):
        store_experts([Expert(torch.ones(128, 256), torch.ones(128, 256), torch.ones(256, 128))])
