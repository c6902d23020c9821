"""Distances between results: what each metric measures, which bounds let pass, and what no bound lets pass."""

from __future__ import annotations

import pytest
import torch

from dsv4.check.metrics import EXACT, METRICS, Bound, Leaf, differing, distance, leaves
from dsv4.ops.mhc import Mixed
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import MXFP4, NVFP4


def both(a: list[float], b: list[float], dtype: torch.dtype = torch.float32) -> tuple[Leaf, Leaf]:
    left, right = (next(iter(leaves(torch.tensor(x).to(dtype)).values())) for x in (a, b))
    return left, right


@pytest.mark.parametrize(
    ("metric", "a", "b", "value"),
    [
        ("abs", [1.0, 2.5], [1.0, 2.0], 0.5),
        ("rel", [1.0, 2.5], [1.0, 2.0], 0.25),
        ("rel", [0.0], [0.0], 0.0),
        ("cos", [1.0, 0.0], [0.0, 1.0], 1.0),
        ("cos", [2.0, 0.0], [1.0, 0.0], 0.0),
        ("rms", [3.0, 4.5], [3.0, 4.0], 0.1),
        ("ulp", [1.0, -1.0], [1.0 + 2**-22, -1.0], 2.0),
        ("ulp", [0.0], [-0.0], 0.0),
        ("ulp", [2.0**-149], [-(2.0**-149)], 2.0),
    ],
)
def test_a_metric_measures(metric: str, a: list[float], b: list[float], value: float) -> None:
    assert METRICS[metric](*both(a, b)) == pytest.approx(value)
    assert distance(*both(a, b), Bound(metric, value)).ok
    assert value == 0 or not distance(*both(a, b), Bound(metric, value * 0.9)).ok


def test_ulps_of_the_narrow_formats_are_codes() -> None:
    assert METRICS["ulp"](*both([448.0, -0.0], [416.0, 2.0**-9], torch.float8_e4m3fn)) == 1
    found, wanted = (leaves(MXFP4.encode(torch.tensor([x])))["data"] for x in ([6.0, -3.0], [6.0, -6.0]))
    assert (found.kind, METRICS["ulp"](found, wanted)) == ("e2m1", 2)


def test_the_share_and_the_floor_of_a_bound() -> None:
    a, b = [1.0] * 99 + [1.0 + 2**-23], [1.0] * 100
    assert distance(*both(a, b), Bound("ulp", 1, share=0.01)).ok
    assert "1 of 100 numbers differ" in distance(*both(a, b), Bound("ulp", 1, share=0.005)).why
    assert distance(*both([1e-9, 1.0], [0.0, 1.0]), Bound("ulp", 1, floor=1e-8)).ok
    assert not distance(*both([1e-7, 1.0], [0.0, 1.0]), Bound("ulp", 1, floor=1e-8)).ok


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("metric", [*METRICS, "bits"])
@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ([NAN, 1.0], [1.0, 1.0], "is NaN"),
        ([1.0, 1.0], [NAN, 1.0], "is NaN"),
        ([INF, 1.0], [-INF, 1.0], "is inf"),
        ([3e38, 1.0], [INF, 1.0], "is inf"),
    ],
)
def test_numbers_that_are_not_finite_stand_at_the_same_places(
    metric: str, a: list[float], b: list[float], why: str
) -> None:
    assert why in distance(*both(a, b), Bound(metric, INF)).why


@pytest.mark.parametrize("metric", [*METRICS, "bits"])
def test_equal_patterns_and_numbers_have_no_distance(metric: str) -> None:
    numbers = [NAN, INF, -INF, 0.0, 1e-45, 3.0]
    assert distance(*both(numbers, numbers), Bound(metric, 0)) == (metric, 0.0, 0.0, "")


def test_an_e4m3_nan_is_no_neighbour_of_448() -> None:
    assert "NaN" in distance(*both([NAN], [448.0], torch.float8_e4m3fn), Bound("ulp", 1)).why


def test_whole_numbers_have_no_bound_but_equality() -> None:
    left, right = (Leaf(torch.tensor([1, n]), "whole") for n in (2, 3))
    assert not distance(left, right, Bound("abs", 10)).ok
    assert distance(left, left, EXACT).ok


def test_one_nan_is_as_good_as_another() -> None:
    a, b = (torch.tensor([n], dtype=torch.int32).view(torch.float32) for n in (0x7FC00000, -1))
    assert differing(a, b) == 0
    assert differing(a, torch.zeros(1)) == 1
    assert differing(torch.zeros(2), torch.zeros(3)) == 3


def test_leaves_have_names() -> None:
    mixed = Mixed(*(torch.ones(1) for _ in range(4)))
    q = quantize(torch.ones(1, 16), NVFP4, "row")
    assert list(leaves((mixed, q, torch.ones(1)))) == [
        "0.x", "0.post", "0.comb", "0.streams", "1.data", "1.scale", "1.global", "2"]  # fmt: skip
    assert list(leaves(torch.ones(1))) == ["y"]
    assert leaves(None) == {}
