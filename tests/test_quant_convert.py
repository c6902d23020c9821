"""Exact changes of format: every code at every distance of scales, in the window and just outside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.quant import e2m1
from dsv4.quant.convert import SPAN, mxfp4_to_fp8, mxfp4_to_nvfp4, widen_codes, widen_fp4_to_e4m3
from dsv4.quant.e8m0 import ue8m0_decode
from dsv4.quant.formats import FP8_BLOCK, MXFP4, NVFP4, FormatError
from dsv4.quant.tensor import QTensor

seeds = st.integers(0, 2**31)


def fp4(codes: torch.Tensor, scale: torch.Tensor) -> QTensor:
    return QTensor(e2m1.pack(codes.to(torch.uint8)).view(torch.int8), scale.to(torch.uint8), MXFP4)


def random_fp4(seed: int, shape: tuple[int, int], low: int, high: int) -> QTensor:
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, shape, generator=gen)
    return fp4(codes, torch.randint(low, high + 1, MXFP4.scale_shape(*shape), generator=gen))


def one_code(code: int, top: int, distance: int) -> QTensor:
    """Two blocks: one of sixes under scale byte `top`, and one of `code` `distance` below it."""
    codes = torch.tensor([7] * 32 + [code] * 32)[None]
    return fp4(codes, torch.tensor([[top, top - distance]]))


def test_widened_codes_are_the_values_times_two_to_the_minus_six() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(widen_codes(codes).float() * 64, e2m1.e2m1_decode(codes))
    assert widen_codes(codes)[8].float().signbit()


@pytest.mark.parametrize("distance", range(SPAN + 4))
def test_folding_every_code_at_every_distance(distance: int) -> None:
    """Up to SPAN every code folds. Beyond, one does only if its value over 2^(distance - SPAN) is a half-integer."""
    for code in range(16):
        wide = widen_fp4_to_e4m3(one_code(code, 130, distance))
        steps = abs(float(e2m1.e2m1_decode(torch.tensor(code, dtype=torch.uint8)))) * 2
        fits = steps * 2.0 ** (SPAN - distance) % 1 == 0 or distance <= SPAN
        assert bool(wide.exact[0]) == fits
        if fits:
            got = wide.data.float() * ue8m0_decode(wide.scale)[:, None]
            assert torch.equal(got, one_code(code, 130, distance).values())
        else:
            assert wide.data.float().isnan().all()


def test_the_window_reaches_exactly_its_span() -> None:
    def folds(distance: int) -> bool:
        return all(bool(widen_fp4_to_e4m3(one_code(c, 130, distance)).exact[0]) for c in range(16))

    assert [folds(d) for d in (0, SPAN - 1, SPAN, SPAN + 1)] == [True, True, True, False]


def test_rows_are_judged_one_by_one() -> None:
    codes = torch.ones(5, 64, dtype=torch.uint8)
    q = fp4(codes, torch.tensor([[130, 130], [130, 100], [5, 5], [130, 255], [255, 255]]))
    wide = widen_fp4_to_e4m3(q)
    assert wide.exact.tolist() == [True, False, False, False, False]  # fits, too far, no room below, NaN, NaN
    assert wide.data[1:].float().isnan().all()
    assert wide.scale[0] == 124


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(6, 240))
def test_rows_in_the_window_keep_their_values(seed: int, low: int) -> None:
    q = random_fp4(seed, (5, 96), low, low + SPAN)
    wide = widen_fp4_to_e4m3(q)
    assert wide.exact.all()
    assert torch.equal(wide.data.float() * ue8m0_decode(wide.scale)[:, None], q.values())


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(6, 240), st.sampled_from([(4, 64), (130, 160), (256, 256), (1, 34)]))
def test_mxfp4_becomes_fp8_without_loss(seed: int, low: int, shape: tuple[int, int]) -> None:
    q = random_fp4(seed, shape, low, low + SPAN)
    got = mxfp4_to_fp8(q)
    assert got.format is FP8_BLOCK
    assert torch.equal(got.values(), q.values())
    assert int(got.scale[0, 0]) == int(q.scale[:128, :4].max()) - 6


def test_mxfp4_that_does_not_fit_fp8_is_refused() -> None:
    q = random_fp4(1, (130, 160), 120, 120 + SPAN)
    scale = q.scale.clone()
    scale[7, 2] = 100
    q = QTensor(q.data, scale, MXFP4)
    with pytest.raises(FormatError, match="row 7, block 2 with scale byte 100"):
        mxfp4_to_fp8(q)
    with pytest.raises(FormatError, match="under 2\\^-121"):
        mxfp4_to_fp8(one_code(1, 5, 0))
    with pytest.raises(FormatError, match="no number"):
        mxfp4_to_fp8(one_code(1, 255, 0))


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(0, 237), st.sampled_from([(4, 64), (3, 32), (2, 48), (5, 34)]))
def test_mxfp4_becomes_nvfp4_without_loss(seed: int, low: int, shape: tuple[int, int]) -> None:
    q = random_fp4(seed, shape, low, low + 17)
    got = mxfp4_to_nvfp4(q)
    assert got.format is NVFP4
    assert torch.equal(got.data.view(torch.int8), q.data)
    assert torch.equal(got.values(), q.values())


def test_nvfp4_known_scales_and_a_shared_top() -> None:
    q = one_code(3, 130, 2)
    alone, shared = mxfp4_to_nvfp4(q), mxfp4_to_nvfp4(q, top=133)
    assert alone.scale.float().tolist() == [[256.0, 256.0, 64.0, 64.0]]
    assert shared.scale.float().tolist() == [[32.0, 32.0, 8.0, 8.0]]
    for got, total in ((alone, 2.0**-5), (shared, 2.0**-2)):
        assert got.global_scale is not None
        assert float(got.global_scale) == total
        assert torch.equal(got.values(), q.values())


def test_blocks_too_far_down_do_not_become_nvfp4_unless_they_are_zero() -> None:
    assert torch.equal(mxfp4_to_nvfp4(one_code(1, 130, 17)).values(), one_code(1, 130, 17).values())
    with pytest.raises(FormatError, match="row 0, block 1 with scale byte 112"):
        mxfp4_to_nvfp4(one_code(1, 130, 18))
    assert torch.equal(mxfp4_to_nvfp4(one_code(8, 130, 60)).values(), one_code(8, 130, 60).values())
