"""Rotary embedding, its frequencies and the norms."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4.ops.norm import rms_norm, unit_rms
from dsv4.ops.rope import frequencies, rope, rotation
from tests.devices import DEVICES, bits, far, normal

YARN = {"dims": 64, "theta": 160000.0, "factor": 16.0, "original": 65536, "beta_fast": 32, "beta_slow": 1}
KNOWN_YARN = {
    0: 1.0, 1: 0.687656045, 8: 0.0500000007, 15: 0.00363553851, 16: 0.00226562493, 17: 0.00139680132,
    18: 8.49689706e-4, 19: 5.08081983e-4, 20: 2.96977785e-4, 21: 1.68179977e-4, 22: 9.08678412e-5, 23: 4.5444227e-5,
    24: 1.95312532e-5, 25: 5.37231244e-6, 31: 5.6805294e-7,
}  # fmt: skip
KNOWN_PLAIN = {1: 0.749894202, 16: 0.00999999978, 31: 1.3335215e-4}


def test_frequencies_have_the_specified_values() -> None:
    """Printed to nine digits, which name an FP32 number; the ramp's ends (15, 25) are among them."""
    yarn, plain = frequencies(**YARN), frequencies(64, 10000.0)
    assert {i: float(yarn[i]) for i in KNOWN_YARN} == pytest.approx(KNOWN_YARN, rel=1.5e-7)
    assert {i: float(plain[i]) for i in KNOWN_PLAIN} == pytest.approx(KNOWN_PLAIN, rel=1.5e-7)
    assert yarn[:16].tolist() == frequencies(64, 160000.0)[:16].tolist()


def test_the_ramp_survives_where_it_has_no_width() -> None:
    """So short a context that both ends of the ramp fall on one pair."""
    steps = frequencies(8, 10000.0, 4.0, 7)
    assert bool(steps.isfinite().all())
    assert bool((steps > 0).all())


@DEVICES
def test_position_zero_is_the_identity(device: str) -> None:
    x = normal("x", 3, 2, 128, dtype=torch.bfloat16).to(device)
    turn = rotation(torch.zeros(3, dtype=torch.int64, device=device), frequencies(**YARN).to(device))
    assert torch.equal(rope(x, turn), x)
    assert torch.equal(rope(x, turn, inverse=True), x)


@DEVICES
def test_pairs_are_interleaved_and_last(device: str) -> None:
    """Pair i is (x[D-R+2i], x[D-R+2i+1]), turned by position * step i; the first D - R stay as they are."""
    steps, x = frequencies(16, 10000.0), normal("x", 5, 40, dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 100, 4000])
    found = rope(x.float().to(device), rotation(positions.to(device), steps.to(device)))
    assert torch.equal(found[:, :24].cpu(), x[:, :24].float())
    angles = (positions.float().unsqueeze(1) * steps).double()
    turned = torch.view_as_complex(x[:, 24:].unflatten(1, (8, 2))) * torch.polar(torch.ones_like(angles), angles)
    assert far(found[:, 24:], torch.view_as_real(turned).flatten(1)) < 1e-6


@DEVICES
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_the_inverse_undoes_the_rotation(dtype: torch.dtype, bound: float, device: str) -> None:
    x = normal("x", 9, 4, 128, dtype=dtype).to(device)
    turn = rotation(torch.arange(9, device=device) * 9973, frequencies(**YARN).to(device))
    assert far(rope(rope(x, turn), turn, inverse=True), x) < bound
    assert far(rope(x, turn), x) > 0.1


def test_scores_depend_on_distance_alone() -> None:
    q, k, steps = normal("q", 1, 64).double().float(), normal("k", 1, 64), frequencies(64, 10000.0)

    def score(at: int, to: int) -> float:
        turned = (rope(x, rotation(torch.tensor([p]), steps)) for x, p in ((q, at), (k, to)))
        return float((next(turned) * next(turned)).sum())

    assert score(50, 40) == pytest.approx(score(1050, 1040), rel=1e-3)
    assert score(50, 40) != pytest.approx(score(50, 41), rel=1e-3)


def test_a_head_dimension_is_broadcast() -> None:
    x = normal("x", 3, 2, 24)
    turn = rotation(torch.tensor([5, 6, 7]), frequencies(8, 100.0))
    assert torch.equal(rope(x, turn)[:, 1], rope(x[:, 1].contiguous(), turn))


def test_angles_at_a_million_tokens_are_fp32_products() -> None:
    """position * step rounded to FP32, then cos and sin; in double precision the angle is up to 0.055 rad elsewhere."""
    steps, position = frequencies(**YARN), 999_983
    turn = rotation(torch.tensor([position]), steps)
    single = [float(torch.tensor(float(position)) * step) for step in steps]
    assert turn.cos[0, ::2].tolist() == pytest.approx([math.cos(a) for a in single], abs=1e-6)
    assert turn.sin[0, 1::2].tolist() == pytest.approx([math.sin(a) for a in single], abs=1e-6)
    exact = [position * 160000.0 ** (-2 * i / 64) for i in range(16)]
    assert max(abs(a - b) for a, b in zip(single, exact, strict=False)) > 0.02


# --- norms -----------------------------------------------------------------------------------------------------------


@DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_is_its_formula_rounded_once(dtype: torch.dtype, device: str) -> None:
    x, weight = normal("x", 7, 96, dtype=dtype, size=3), 1 + 0.2 * normal("w", 96)
    exact = weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    found = rms_norm(x.to(device), weight.to(device), 1e-6).cpu()
    assert found.dtype == dtype
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-21
    assert bool(((found.double() - exact).abs() <= exact.abs() * step).all())


@DEVICES
def test_rms_norm_of_zeros_is_zero(device: str) -> None:
    assert rms_norm(torch.zeros(2, 8, device=device), torch.ones(8, device=device), 1e-6).tolist() == [[0.0] * 8] * 2


def test_the_norm_weight_is_used_as_it_is() -> None:
    """No 1 is added: a weight of zero gives zero."""
    assert not rms_norm(normal("x", 2, 8), torch.zeros(8), 1e-6).any()


@DEVICES
def test_unit_rms_rounds_after_every_step(device: str) -> None:
    """Square, mean, eps, reciprocal root and product, each rounded to BF16 once, like a BF16 tensor on the GPU."""
    x = normal("x", 18, 4, 128, dtype=torch.bfloat16, size=2)
    mean = x.square().double().mean(-1, keepdim=True).bfloat16()
    root = (1 / (mean + 1e-6).double().sqrt()).bfloat16()
    assert torch.equal(bits(unit_rms(x.to(device), 1e-6).cpu()), bits(x * root))


@DEVICES
def test_unit_rms_gives_every_head_length_one(device: str) -> None:
    found = unit_rms(normal("x", 5, 3, 64, size=7).to(device), 1e-6)
    assert found.square().mean(-1).flatten().tolist() == pytest.approx([1.0] * 15, rel=1e-5)
