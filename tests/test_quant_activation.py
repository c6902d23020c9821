"""The activation quantisers against the definition in exact and in plain FP32 arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.quant import e2m1, e4m3
from dsv4.quant.activation import fp4_quantize, fp4_simulate, fp8_quantize, fp8_simulate
from dsv4.quant.e8m0 import ue8m0_decode
from tests.synthetic import crc, u

DTYPES = [torch.bfloat16, torch.float32]
Simulate = Callable[[torch.Tensor, int], torch.Tensor]
BOTH = pytest.mark.parametrize("simulate", [fp8_simulate, fp4_simulate])


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def scales(amax: torch.Tensor, top: float, floor: float) -> torch.Tensor:
    """The definition, step by step: floor, FP32 product, exponent field plus one where mantissa bits are set."""
    t = torch.maximum(amax.float(), torch.tensor(floor)) * torch.tensor(1.0 / top)
    raw = t.view(torch.int32)
    return torch.ldexp(torch.ones_like(t), (raw >> 23) - 127 + ((raw & 0x7FFFFF) != 0))


def defined(x: torch.Tensor, block: int, simulate: Simulate) -> torch.Tensor:
    """Divide, clamp, round through the narrow format, multiply: block by block."""
    top, floor = (448.0, 1e-4) if simulate is fp8_simulate else (6.0, 6 * 2.0**-126)
    out = []
    for part in torch.split(x.float(), block, -1):
        s = scales(part.abs().amax(-1, keepdim=True), top, floor)
        y = (part / s).clamp(-top, top)
        out.append((e4m3.e4m3_encode(y).float() if top == 448 else e2m1.e2m1_round(y)) * s)
    return torch.cat(out, -1).to(x.dtype)


def sample(seed: int, shape: tuple[int, ...], dtype: torch.dtype, size: float, spread: float = 3.0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=gen) * torch.exp2(torch.randn(shape, generator=gen) * spread + size)
    return torch.where(torch.rand(shape, generator=gen) < 0.1, x * 0, x).to(dtype)


def test_fp8_known_bytes() -> None:
    x = torch.from_numpy(3 * u("actq", 128)).bfloat16()
    assert float(x.abs().max()) == 2.984375
    q, s = fp8_quantize(x, 128)
    data = q.view(torch.uint8).numpy().tobytes()
    assert s.tolist() == [2.0**-7]
    assert data[:16].hex(" ") == "7a f9 f8 7b 71 79 e1 5e 75 6a fc f5 f1 f2 da 69"
    assert crc(data) == 0x05C9CBA8


def test_fp4_known_codes() -> None:
    x = torch.from_numpy(3 * u("fp4q", 32)).bfloat16()
    packed, s = fp4_quantize(x)
    assert ue8m0_decode(s).tolist() == [0.5]
    codes = e2m1.unpack(packed).tolist()
    assert "".join(f"{c:x}" for c in codes) == "7f9555afba2efd67d87471605ef52652"


@pytest.mark.parametrize("dtype", DTYPES)
@BOTH
def test_scale_of_every_mantissa(simulate: Simulate, dtype: torch.dtype) -> None:
    """Every BF16 number under 2^122, every FP32 mantissa of one binade: the bits equal the FP32 product's ceiling."""
    if dtype == torch.bfloat16:
        x = torch.arange(0, 0x7C80, dtype=torch.int16).view(dtype)
    else:
        x = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(dtype)
    assert torch.equal(bits(simulate(x[:, None], 1)), bits(defined(x[:, None], 1, simulate)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code_scale", [1.0, 2.0**-7, 2.0**9])
@BOTH
def test_every_value_midpoint_and_neighbour(simulate: Simulate, code_scale: float, dtype: torch.dtype) -> None:
    """All numbers of the narrow format and all ties between them, beside one that pins the scale."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = codes if simulate is fp8_simulate else torch.tensor(e2m1.VALUES)
    ties = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0)])
    x = torch.stack([points, -points, torch.full_like(points, float(values[-1]))], -1).to(dtype) * code_scale
    got = simulate(x, 3)
    assert torch.equal(bits(got), bits(defined(x, 3, simulate)))
    assert torch.equal(got[: len(values)], x[: len(values)])  # a number of the format is itself
    assert torch.equal(bits(got[:, 0]), bits(-got[:, 1]))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(1, 128), (3, 448), (2, 3, 48), (5, 160), (128,), (0, 64), (2, 7)]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(DTYPES),
    st.sampled_from([-150.0, -126.0, -40.0, -14.0, 0.0, 20.0, 80.0]),
)
def test_simulation_is_the_definition(
    seed: int, shape: tuple[int, ...], block: int, dtype: torch.dtype, size: float
) -> None:
    x = sample(seed, shape, dtype, size)
    simulates: list[Simulate] = [fp8_simulate, fp4_simulate]
    for simulate in simulates:
        got = simulate(x, block)
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        assert torch.equal(bits(got), bits(defined(x, block, simulate)))
        assert torch.equal(bits(simulate(got, block)), bits(got))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(1, 128), (3, 448), (2, 3, 48), (5, 160)]), st.sampled_from(DTYPES))
def test_what_is_stored_decodes_to_the_simulation(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = sample(seed, shape, dtype, 0.0)
    q, s = fp8_quantize(x, 64)
    assert s.shape == (*shape[:-1], -(-shape[-1] // 64))
    wide = s.repeat_interleave(64, -1)[..., : shape[-1]]
    assert torch.equal(bits((q.float() * wide).to(dtype)), bits(fp8_simulate(x, 64)))
    packed, byte = fp4_quantize(x)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert byte.shape == (*shape[:-1], -(-shape[-1] // 32))
    wide = ue8m0_decode(byte).repeat_interleave(32, -1)[..., : shape[-1]]
    assert torch.equal(bits((e2m1.e2m1_decode(e2m1.unpack(packed)) * wide).to(dtype)), bits(fp4_simulate(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@BOTH
def test_zero_blocks_stay_zero(simulate: Simulate, dtype: torch.dtype) -> None:
    assert not simulate(torch.zeros(2, 96, dtype=dtype), 64).any()


def test_zero_blocks_have_the_floor_scale() -> None:
    q, s = fp8_quantize(torch.zeros(1, 128), 128)
    assert s.tolist() == [[2.0**-22]]
    assert not q.view(torch.uint8).any()
    packed, byte = fp4_quantize(torch.zeros(1, 32))
    assert byte.tolist() == [[1]]
    assert not packed.any()


def test_the_floor_of_fp8_lets_small_numbers_vanish() -> None:
    x = torch.tensor([[2.0**-32, 2.0**-31, 3 * 2.0**-32, -(2.0**-33)]])
    assert fp8_simulate(x, 4).tolist() == [[0.0, 2.0**-31, 2.0**-30, -0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@BOTH
def test_a_row_does_not_depend_on_its_company(simulate: Simulate, dtype: torch.dtype) -> None:
    x = sample(3, (37, 448), dtype, 0.0)
    whole = simulate(x, 64)
    for row in range(37):
        assert torch.equal(bits(simulate(x[row], 64)), bits(whole[row]))
        assert torch.equal(bits(simulate(x[row : row + 1], 64)[0]), bits(whole[row]))
    assert torch.equal(bits(simulate(x[:, 64:128], 64)), bits(whole[:, 64:128]))


@BOTH
def test_views_are_read_as_they_lie_and_not_written(simulate: Simulate) -> None:
    x = sample(4, (6, 5, 512), torch.bfloat16, 0.0)
    before = x.clone()
    for view in (x[..., :448], x.transpose(0, 1), x[:, 2, ::2], x[..., 3:60]):
        assert torch.equal(bits(simulate(view, 64)), bits(simulate(view.contiguous(), 64)))
    assert torch.equal(bits(x), bits(before))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@BOTH
def test_numbers_that_are_not_finite_give_nan_where_they_stand(
    simulate: Simulate, dtype: torch.dtype, bad: float
) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    x[0, 5] = bad
    got = simulate(x, 32)
    assert got[0, 5].isnan()
    assert torch.equal(got[0, 32:], torch.ones(32, dtype=dtype))
    assert torch.equal(got[1], torch.ones(64, dtype=dtype))
    if simulate is fp8_simulate:
        assert fp8_quantize(x, 32)[0][0, 5].isnan()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2.0**122), (torch.float32, 2.0**106)])
@BOTH
def test_numbers_past_the_stated_range_are_right_or_not_finite(
    simulate: Simulate, dtype: torch.dtype, limit: float
) -> None:
    below, above = torch.tensor([limit * 0.99], dtype=dtype), limit * torch.tensor([1.0, 1.5, 7.7, 60.0], dtype=dtype)
    assert torch.equal(simulate(below[:, None], 1), defined(below[:, None], 1, simulate))
    got, want = simulate(above[:, None], 1), defined(above[:, None], 1, simulate)
    assert bool((~got.isfinite() | (got == want)).all())
    assert not got[-1].isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@BOTH
def test_a_gpu_gives_the_same_bits(simulate: Simulate, dtype: torch.dtype) -> None:
    for size in (-150.0, -126.0, -14.0, 0.0, 20.0):
        x = sample(5, (64, 448), dtype, size)
        assert torch.equal(bits(simulate(x.cuda(), 64).cpu()), bits(simulate(x, 64)))
    x = sample(6, (64, 448), dtype, 0.0)
    for quantize in (fp8_quantize, fp4_quantize):
        for ours, host in zip(quantize(x.cuda(), 64), quantize(x, 64), strict=True):
            assert torch.equal(bits(ours.cpu()), bits(host))
