"""The stored weight formats: bytes computed by hand, known values of the model's description, and round trips."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.quant import e2m1, e4m3
from dsv4.quant.activation import fp8_quantize, fp8_simulate
from dsv4.quant.e8m0 import ue8m0_decode
from dsv4.quant.formats import FORMATS, FP8_BLOCK, FP8_BLOCK_F32, MXFP4, NVFP4, Format, FormatError, has_nan_scale
from dsv4.quant.tensor import QTensor
from tests.synthetic import crc, u

ALL = list(FORMATS.values())
EXACT = [FP8_BLOCK, MXFP4]  # power-of-two scales: what was decoded encodes to itself
seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(1, 140), st.integers(1, 140).map(lambda n: 2 * n))


def matrix(seed: int, shape: tuple[int, int], spread: float = 6.0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen) * torch.exp2(torch.randn(shape, generator=gen) * spread)


def tensor(name: str, shape: tuple[int, ...], factor: float) -> torch.Tensor:
    return torch.from_numpy(factor * u(name, math.prod(shape))).float().reshape(shape)


def same(a: QTensor, b: QTensor) -> bool:
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(a.scale, b.scale)


def test_generator_known_values() -> None:
    assert crc(b"actq") == 2216609627
    want = [0.7897583120502532, -0.7476235600188375, -0.6903215353377163, 0.9134110901504755]
    assert u("actq", 4).tolist() == want


def test_fp8_linear_known_values() -> None:
    weight = QTensor(
        e4m3.e4m3_encode(tensor("w8", (128, 256), 200)), torch.tensor([[118, 119]], dtype=torch.uint8), FP8_BLOCK
    )
    x = tensor("x256", (256,), 2).bfloat16()
    assert fp8_quantize(x, 128)[1].tolist() == [2.0**-7, 2.0**-7]
    y = weight.values() @ fp8_simulate(x, 128).float()
    want = torch.tensor([1.112312, -0.262405, 6.134329, -10.573196, -7.251541, -8.834145])
    torch.testing.assert_close(y[:6], want, rtol=0, atol=5e-6)
    assert float(y.sum()) == pytest.approx(-149.94001, abs=1e-4)


def test_fp4_linear_known_values() -> None:
    codes = np.clip(np.trunc(8 * u("w4", 128 * 256) + 8), 0, 15).astype(np.uint8).reshape(128, 256)
    packed = e2m1.pack(torch.from_numpy(codes))
    assert bytes(packed[0, :8].tolist()).hex() == "7f486a25e4071bfc"
    assert crc(packed.numpy().tobytes()) == 0xD4246B9D
    scale = (torch.arange(128)[:, None] + torch.arange(8)) % 4 + (127 - 6)
    weight = QTensor(packed.view(torch.int8), scale.to(torch.uint8), MXFP4)
    y = weight.values() @ fp8_simulate(tensor("x256", (256,), 2).bfloat16(), 128).float()
    want = torch.tensor([-4.985626, -4.074066, 1.445251, 0.671112, -7.057968, -0.714027])
    torch.testing.assert_close(y[:6], want, rtol=0, atol=5e-6)
    assert float(y.sum()) == pytest.approx(-36.84386, abs=1e-4)


def test_fp8_known_bytes() -> None:
    x = torch.zeros(129, 130)
    x[0, 0], x[1, 1], x[0, 129], x[128, 0] = 448.0, -1.5, 0.5, 449.0
    q = FP8_BLOCK.encode(x)
    assert q.scale.tolist() == [[127, 127 - 9], [128, 127]]  # 0.5 / 448 rounds up to 2^-9; zeros have scale 1
    data = q.data.view(torch.uint8)
    assert [int(data[i]) for i in ((0, 0), (1, 1), (0, 129), (128, 0))] == [0x7E, 0xBC, 0x78, 0x76]
    assert q.values()[128, 0] == 448.0  # 224.5 lies between 224 and 240


def test_fp8_f32_known_bytes() -> None:
    q = FP8_BLOCK_F32.encode(torch.tensor([[896.0, -3.0, 0.0]]))
    assert q.scale.tolist() == [[2.0]]
    assert q.data.view(torch.uint8).tolist() == [[0x7E, 0xBC, 0x00]]


def test_mxfp4_known_bytes() -> None:
    x = torch.zeros(1, 34)
    x[0, :4], x[0, 32] = torch.tensor([6.0, -0.5, 2.5, -3.0]), 7.0
    q = MXFP4.encode(x)
    assert q.data.view(torch.uint8)[0, :2].tolist() == [0x97, 0xD4]
    assert int(q.data[0, 16]) == 6
    assert q.scale.tolist() == [[127, 128]]
    assert q.values()[0, 32] == 8.0  # 7 / 2 is a tie of 3 and 4


def test_nvfp4_known_bytes() -> None:
    x = torch.zeros(1, 48)
    x[0, :2], x[0, 16] = torch.tensor([6 * 448.0, -448.0 * 1.5]), 24.0
    q = NVFP4.encode(x)
    assert q.global_scale is not None
    assert float(q.global_scale) == 1.0
    assert q.scale.view(torch.uint8).tolist() == [[0x7E, 0x48, 0x01]]  # 448, 4, and 2^-9 for zeros
    assert q.data[0, 0] == 0xB7
    assert q.data[0, 8] == 0x07
    assert q.values()[0, 16] == 24.0


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_shapes_follow_the_rules_for_odd_sizes(fmt: Format) -> None:
    q = fmt.encode(matrix(1, (130, 150)))
    assert q.shape == (130, 150)
    assert tuple(q.data.shape) == fmt.data_shape(130, 150)
    assert tuple(q.scale.shape) == fmt.scale_shape(130, 150)
    assert (q.data.dtype, q.scale.dtype) == (fmt.data_dtype, fmt.scale_dtype)
    assert q.nbytes == sum(t.nbytes for t in (q.data, q.scale, q.global_scale) if t is not None)
    assert q.values().shape == (130, 150)
    assert q.values() is q.values()
    assert q.to("cpu").format is fmt


def test_stored_shapes_of_official_matrices() -> None:
    assert FP8_BLOCK.scale_shape(1536, 7168) == (12, 56)
    assert (MXFP4.data_shape(3072, 7168), MXFP4.scale_shape(3072, 7168)) == ((3072, 3584), (3072, 224))
    assert NVFP4.scale_shape(2048, 4096) == (2048, 256)
    names = {f.name: (f.data_name, f.scale_name) for f in ALL}
    assert names == {
        "fp8": ("F8_E4M3", "F8_E8M0"),
        "fp8_f32": ("F8_E4M3", "F32"),
        "fp8_row": ("F8_E4M3", "F8_E8M0"),
        "mxfp4": ("I8", "F8_E8M0"),
        "nvfp4": ("U8", "F8_E4M3"),
    }


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda f: f.name)
def test_an_odd_width_cannot_be_packed(fmt: Format) -> None:
    with pytest.raises(FormatError, match="cannot pack a row; got 33 values"):
        fmt.encode(torch.ones(2, 33))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_numbers_that_are_not_finite_are_refused(fmt: Format, bad: float) -> None:
    x = torch.ones(4, 32)
    x[2, 3] = bad
    with pytest.raises(FormatError, match="NaN or Inf"):
        fmt.encode(x)


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_zero_blocks_encode_to_zeros_with_a_defined_scale(fmt: Format) -> None:
    q = fmt.encode(torch.zeros(3, 64))
    assert not q.data.view(torch.uint8).any()
    stored = {"fp8": 127, "fp8_f32": 1.0, "fp8_row": 105, "mxfp4": 127, "nvfp4": 2.0**-9}
    assert set(q.scale.float().flatten().tolist()) == {stored[fmt.name]}
    assert not q.values().any()


def test_subnormal_fp32_survives_an_fp32_scale() -> None:
    x = torch.tensor([[2.0**-149, 2.0**-140, -(2.0**-142), 3 * 2.0**-149]])
    assert torch.equal(FP8_BLOCK_F32.encode(x).values(), x)


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_smallest_and_largest_numbers_do_not_become_nan(fmt: Format) -> None:
    values = torch.tensor([[2.0**-149, 2.0**-130, 2.0**-126, 0.0], [1.0e38, -1.0, 2.0**-149, 0.0]])
    for row in values:
        assert fmt.encode(row[None].repeat(1, 8)).values().isfinite().all()


def test_nan_scales_are_seen_and_decode_to_nan() -> None:
    for fmt in ALL:
        q = fmt.encode(torch.ones(2, 64))
        nan = math.nan if fmt is FP8_BLOCK_F32 else 255
        (q.scale if fmt is FP8_BLOCK_F32 else q.scale.view(torch.uint8))[0, 0] = nan
        assert has_nan_scale(q)
        assert q.values()[0, 0].isnan()


@settings(max_examples=40, deadline=None)
@given(seeds, shapes, st.sampled_from(EXACT))
def test_decoded_values_encode_to_themselves(seed: int, shape: tuple[int, int], fmt: Format) -> None:
    once = fmt.encode(matrix(seed, shape))
    twice = fmt.encode(once.values())
    assert torch.equal(twice.values(), once.values())
    assert same(fmt.encode(twice.values()), twice)


@settings(max_examples=40, deadline=None)
@given(seeds, shapes, st.sampled_from(ALL))
def test_error_is_half_a_step_and_nothing_exceeds_the_top(seed: int, shape: tuple[int, int], fmt: Format) -> None:
    x = matrix(seed, shape, 1.0)
    got = fmt.encode(x).values()
    # Half a step: 2^-4 of the number in E4M3, a quarter of it in E2M1, or half the subnormal step of the block.
    relative, smallest = (2.0**-4, 2.0**-9 / 448 * 2) if fmt.values_per_byte == 1 else (0.26, 0.5 / 6 * 2)
    block = fmt._spread(fmt._amax(x), shape)
    assert bool(((got - x).abs() <= x.abs() * relative + block * smallest * 0.51).all())
    assert bool((got.abs() <= block * (1 + relative)).all())


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_values_are_divided_by_the_scale_as_stored(seed: int) -> None:
    """The stored NVFP4 scale differs from amax / 6 by up to 6 %: codes must be the best for what the reader uses."""
    x = matrix(seed, (4, 64), 1.0)
    q = NVFP4.encode(x)
    assert q.global_scale is not None
    stored = (e4m3.e4m3_decode(q.scale) * q.global_scale).repeat_interleave(16, 1)
    every = stored[..., None] * torch.tensor(e2m1.VALUES)
    best = (every - x.abs()[..., None]).abs().amin(-1)
    assert bool(((q.values() - x).abs() <= best + stored * 1e-6).all())  # a tie may fall either way by an FP32 ulp


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_mxfp4_scales_are_the_smallest_that_do_not_saturate(seed: int) -> None:
    x = matrix(seed, (4, 64))
    ratio = MXFP4._amax(x) / ue8m0_decode(MXFP4.encode(x).scale)
    assert bool(((ratio > 3) & (ratio <= 6)).all())


def test_every_block_has_its_own_scale() -> None:
    for fmt in ALL:
        x = torch.ones(260, 260)
        x[fmt.block[0] :, fmt.block[1] :] = 1024.0
        torch.testing.assert_close(fmt.encode(x).values(), x, rtol=0.07, atol=0)


def test_a_qtensor_of_the_wrong_shape_or_dtype_is_an_assertion() -> None:
    q = FP8_BLOCK.encode(torch.ones(4, 64))
    with pytest.raises(AssertionError, match="fp8 shapes"):
        QTensor(q.data, q.scale.repeat(1, 2), FP8_BLOCK)
    with pytest.raises(AssertionError, match="fp8 dtypes"):
        QTensor(q.data, q.scale.float(), FP8_BLOCK)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_a_gpu_encodes_and_decodes_to_the_same_bits(fmt: Format) -> None:
    x = matrix(7, (260, 416))
    host, ours = fmt.encode(x), fmt.encode(x.cuda())
    assert same(ours.to("cpu"), host)
    assert torch.equal(ours.values().cpu(), host.values())
