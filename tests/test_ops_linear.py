"""Products: known values, formats, groups, and rows that do not depend on their company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.ops.linear import dense, grouped_linear, linear, matmul
from dsv4.quant.formats import FP8_BLOCK, MXFP4
from dsv4.quant.rounding import FP8, none
from dsv4.quant.tensor import QTensor
from tests.devices import DEVICES, bits, far, normal
from tests.synthetic import crc, u


def exponents(values: Tensor) -> Tensor:
    return (values + 127).to(torch.uint8)


def known_fp8() -> QTensor:
    data = torch.from_numpy(200 * u("w8", 128 * 256)).float().to(torch.float8_e4m3fn).view(128, 256)
    return QTensor(data, exponents(torch.tensor([[-9, -8]])), FP8_BLOCK)


def known_fp4() -> QTensor:
    codes = (8 * torch.from_numpy(u("w4", 128 * 256)) + 8).to(torch.int64).clamp(0, 15).view(128, 256)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    assert packed[0, :8].numpy().tobytes().hex(" ") == "7f 48 6a 25 e4 07 1b fc"
    assert crc(packed.numpy().tobytes()) == 0xD4246B9D
    scale = exponents(-6 + (torch.arange(128).unsqueeze(1) + torch.arange(8)) % 4)
    return QTensor(packed.view(MXFP4.data_dtype), scale, MXFP4)


@pytest.mark.parametrize(
    ("weight", "first", "total"),
    [
        (known_fp8, [1.112312, -0.262405, 6.134329, -10.573196, -7.251541, -8.834145], -149.94001),
        (known_fp4, [-4.985626, -4.074066, 1.445251, 0.671112, -7.057968, -0.714027], -36.84386),
    ],
)
def test_quantised_products_have_the_specified_values(weight: object, first: list[float], total: float) -> None:
    """FP8 and FP4 matrices with FP8 activations, before and after the rounding to BF16."""
    matrix = weight()  # type: ignore[operator]
    x = torch.from_numpy(2 * u("x256", 256)).bfloat16().unsqueeze(0)
    wide = linear(x.float(), matrix, rounding=FP8)[0]
    assert wide[:6].tolist() == pytest.approx(first, abs=2e-5)
    assert float(wide.sum()) == pytest.approx(total, abs=5e-3)
    rounded = linear(x, matrix, rounding=FP8)[0]
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, wide.bfloat16())


@DEVICES
def test_without_simulation_and_without_quantisation_nothing_is_rounded(device: str) -> None:
    x, weight = normal("x", 3, 256), normal("w", 16, 256)
    assert far(linear(x.to(device), weight.to(device), rounding=FP8), x.double() @ weight.double().T) < 1e-5
    matrix = known_fp8()
    found = linear(x.to(device), matrix.to(device), rounding=none)
    assert far(found, x.double() @ matrix.values().double().T) < 1e-5
    simulated = linear(x.to(device), matrix.to(device), rounding=FP8)
    assert far(simulated, x.double() @ matrix.values().double().T) > 1e-3


@DEVICES
def test_the_sum_is_fp32_whatever_comes_in(device: str) -> None:
    """256 + 1 + ... + 1 in BF16 would stay 256."""
    ones = torch.ones(1, 257, dtype=torch.bfloat16, device=device)
    weight = torch.ones(2, 257, dtype=torch.bfloat16, device=device)
    weight[:, 0] = 256
    assert matmul(ones, weight).tolist() == [[512.0, 512.0]]


@DEVICES
def test_each_group_has_its_own_matrix(device: str) -> None:
    x, weight = normal("x", 5, 3, 40), normal("w", 3 * 7, 40)
    wanted = torch.einsum("tgk,grk->tgr", x.double(), weight.double().view(3, 7, 40)).flatten(1)
    assert far(grouped_linear(x.to(device), weight.to(device)), wanted) < 1e-5


def test_dense_decodes_quantised_matrices_and_leaves_others_as_they_are() -> None:
    weight = normal("w", 3, 4, dtype=torch.bfloat16)
    assert dense(known_fp8()).dtype == torch.float32
    assert dense(weight) is weight


SHAPES = [(1, 1), (3, 5), (8, 8), (16, 24), (17, 100), (24, 512), (48, 64), (64, 7), (128, 128), (4096, 3), (1000, 513)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_in_any_company(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """[T, K] x [N, K] for T of 1 to 40 and any place in it; tiny, narrow and wide, so that every branch is met."""
    inputs, outputs = shape
    x, weight = normal("x", 40, inputs, dtype=dtype), normal("w", outputs, inputs, dtype=dtype)
    alone = torch.cat([matmul(row, weight) for row in x.split(1)])
    for start, end in [(0, n) for n in range(1, 41)] + [(n, 40) for n in range(1, 40)]:
        assert torch.equal(bits(matmul(x[start:end], weight)), bits(alone[start:end])), f"rows {start} to {end}"


def test_a_row_has_the_same_bits_whatever_its_stride() -> None:
    """A view into a wider tensor, as a group of heads is."""
    wide, weight = normal("x", 9, 3, 128), normal("w", 64, 128)
    for group in range(3):
        assert torch.equal(bits(matmul(wide[:, group], weight)), bits(matmul(wide[:, group].contiguous(), weight)))


def test_no_rows_give_no_rows() -> None:
    for shape in SHAPES:
        assert matmul(torch.zeros(0, shape[0]), torch.zeros(shape[1], shape[0])).shape == (0, shape[1])
