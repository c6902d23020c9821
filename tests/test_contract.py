"""The runner of the contract catches what it is for: every kind of wrong implementation is planted here, and seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.check import verify
from dsv4.check.cases import cases
from dsv4.check.contract import Case, Verdict, judge
from dsv4.check.fences import GUARD, Allocations, fence, fenced, transform
from dsv4.check.metrics import EXACT, METRICS, Bound, Leaf, differing, distance, leaves
from dsv4.errors import KernelError
from dsv4.ops.mhc import Mixed
from dsv4.ops.norm import rms_norm
from dsv4.ops.op import Implementation
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import FP8_ROW, MXFP4, NVFP4

HALF = torch.bfloat16


def norm_case(**changes: Any) -> Case:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).to(HALF)
    given = {"bounds": {"bf16": Bound("ulp", 1)}, "tokens": (0,)} | changes
    return Case(op=rms_norm, name="planted", make=lambda: (x, torch.ones(64), 1e-6), **given)


def quantize_case() -> Case:
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(2)).to(HALF)
    return Case(op=quantize, name="planted", make=lambda: (x, FP8_ROW), tokens=(0,))


def wrong(verdicts: list[Verdict]) -> set[str]:
    return {verdict.check for verdict in verdicts if not verdict.ok}


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """A right one that allocates as a kernel's wrapper does."""
    out = torch.empty_like(x)
    out.copy_(rms_norm.reference(x, weight, eps))
    return out


def test_a_right_implementation_passes_every_check() -> None:
    oracle = norm_case(oracle=lambda given, found: rms_norm(*given))
    found = judge(oracle, normed)
    assert {verdict.check for verdict in found} == {"memory", "again", "alone", "reference", "oracle"}
    assert wrong(found) == set()
    assert wrong(judge(norm_case(), normed, twin=rms_norm.reference)) == set()


def beyond_its_output(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = normed(x, weight, eps)
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)
    return out


def before_its_output(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = normed(x, weight, eps)
    out.as_strided((1,), (1,), out.storage_offset() - 3).fill_(0)
    return out


def beyond_its_scratch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    scratch = x.new_zeros(4)
    scratch.as_strided((1,), (1,), scratch.storage_offset() + 4).fill_(1)
    return normed(x, weight, eps)


def into_its_input(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = normed(x, weight, eps)
    x[0, 0] += 1
    return out


def beside_its_input(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    weight.as_strided((1,), (1,), weight.storage_offset() + 64).fill_(1)
    return normed(x, weight, eps)


def one_number_not_written(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    out.view(-1)[:-1] = rms_norm.reference(x, weight, eps).view(-1)[:-1]
    return out


def reading_too_far(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The last row's mean takes one number from behind it."""
    row = x.as_strided((65,), (1,), x.storage_offset() + 5 * 64)
    out = normed(x, weight, eps)
    out[-1] = rms_norm.reference(row, torch.ones(65), eps)[:64]
    return out


CALLS = [0]


def another_every_time(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    CALLS[0] += 1
    out = normed(x, weight, eps)
    out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(100.0 * (-1) ** CALLS[0], dtype=HALF))
    return out


def by_company(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One last bit that follows the number of rows; inside the bound of the case."""
    out = normed(x, weight, eps)
    return torch.nextafter(out, torch.full_like(out, 100)) if len(x) > 5 else out


def two_off(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, high = normed(x, weight, eps), torch.full_like(x, 100)
    out[-1, 7] = torch.nextafter(torch.nextafter(out, high), high)[-1, 7]
    return out


def a_nan_more(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = normed(x, weight, eps)
    out[-1, 2] = float("nan")
    return out


def wide(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return normed(x, weight, eps).float()


def one_row_short(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return normed(x, weight, eps)[:-1]


def refusing(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    raise KernelError("it does not build", got="the compiler's words")


def crashing(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x @ weight.view(1, -1)


PLANTED: dict[Callable[..., Tensor], set[str]] = {
    beyond_its_output: {"memory"},
    before_its_output: {"memory"},
    beyond_its_scratch: {"memory"},
    into_its_input: {"memory"},
    beside_its_input: {"memory"},
    one_number_not_written: {"alone", "reference"},  # alone: another number is the last
    reading_too_far: {"alone", "reference"},
    another_every_time: {"again"},
    by_company: {"alone"},
    two_off: {"reference"},
    a_nan_more: {"reference"},
    wide: {"reference"},
    one_row_short: {"alone", "reference"},
    refusing: {"run"},
    crashing: {"run"},
}


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(bug: Callable[..., Tensor]) -> None:
    found = wrong(judge(norm_case(), bug))
    assert found >= PLANTED[bug]
    assert found - PLANTED[bug] <= {"alone", "again"}, "no check cries for another's reason"


def test_a_bug_is_said_in_words() -> None:
    def said(bug: Callable[..., Tensor]) -> str:
        return " ".join(verdict.distance.why for verdict in judge(norm_case(), bug))

    assert "2 bytes beside an output were written" in said(beyond_its_output)
    assert "argument 0 was changed" in said(into_its_input)
    assert "4 bytes beside an input were written" in said(beside_its_input)
    assert "1 places where one alone is NaN" in said(a_nan_more)
    assert "float32[6, 64] where bfloat16[6, 64] was wanted" in said(wide)
    assert "the compiler's words" in said(refusing)


def test_one_wrong_byte_is_caught() -> None:
    def off(x: Tensor, fmt: Any) -> Any:
        q = quantize.reference(x, fmt)
        q.data.view(torch.uint8)[-1, -1] ^= 1
        return q

    assert "reference" in wrong(judge(quantize_case(), off))
    assert wrong(judge(quantize_case(), quantize.reference)) == set()

    def scale_off(x: Tensor, fmt: Any) -> Any:
        q = quantize.reference(x, fmt)
        q.scale[0, 1] += 1
        return q

    assert "reference" in wrong(judge(quantize_case(), scale_off))


def test_a_twin_has_to_agree_to_the_last_bit() -> None:
    nudged = norm_case()
    assert wrong(judge(nudged, normed, twin=lambda *given: by_company(*given))) == {"unfused"}


def test_what_an_op_writes_is_judged_and_its_neighbourhood_too() -> None:
    case = next(one for one in cases("kv") if one.op.name == "write_kv" and "ends of pages bf16" in one.name)
    assert wrong(judge(case, case.op.reference)) == set()

    def a_byte_elsewhere(*given: Any) -> None:
        case.op.reference(*given)
        given[4][1, -1] ^= 1

    def a_scale_missed(kv: Tensor, weight: Tensor, eps: float, turn: Any, pages: Tensor, rows: Tensor) -> None:
        before = pages.clone()
        case.op.reference(kv, weight, eps, turn, pages, rows)
        pages[0, 64 * 576 :] = before[0, 64 * 576 :]

    assert wrong(judge(case, a_byte_elsewhere)) == {"reference", "oracle"}
    assert "reference" in wrong(judge(case, a_scale_missed))


def test_an_implementation_may_refuse_where_the_case_says_so() -> None:
    refused = judge(norm_case(), normed, accepts=lambda *given: "too narrow")
    assert [(v.check, v.leaf, v.ok) for v in refused] == [("accepts", "too narrow", False)]
    assert [v.ok for v in judge(norm_case(refusable=True), normed, accepts=lambda *given: "too narrow")] == [True]
    special = judge(norm_case(), normed, "cluster", accepts=lambda *given: "too many tokens", spare=True)
    assert [(v.check, v.leaf, v.ok) for v in special] == [("accepts", "too many tokens", True)]
    assert wrong(judge(norm_case(), normed, accepts=lambda *given: None)) == set()


def test_a_case_that_every_kernel_refuses_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a single kernel takes is not: the others are shown as refusing."""
    verify.prepare()

    def verdicts(refusals: Mapping[str, str | None], **changes: Any) -> list[tuple[str, str, bool]]:
        found = {name: Implementation(lambda *given, why=why: why, normed) for name, why in refusals.items()}
        monkeypatch.setattr(rms_norm, "implementations", found)
        monkeypatch.setattr(verify, "implementations", lambda op, device: dict.fromkeys(refusals, normed))
        pairs = verify.check([norm_case(**changes)], torch.device("cpu"))
        return [(v.implementation, v.leaf, v.ok) for judged in pairs for v in judged if v.check == "accepts"]

    assert verdicts({"fused": None, "cluster": "too many"}) == [("cluster", "too many", True)]
    assert verdicts({"fused": "narrow", "cluster": None}) == [("fused", "narrow", True)]
    refused = {"fused": "narrow", "cluster": "too many"}
    assert [ok for _, _, ok in verdicts(refused)] == [False, False]
    assert [ok for _, _, ok in verdicts(refused, refusable=True)] == [True, True]
    assert [ok for _, _, ok in verdicts({"cluster": "too many"})] == [False]


def test_a_library_may_have_other_bits_in_company() -> None:
    assert "alone" not in {verdict.check for verdict in judge(norm_case(), by_company, company=True)}
    assert wrong(judge(norm_case(), by_company, company=True)) == set()


def test_the_reference_itself_is_held_against_the_oracle_alone() -> None:
    case = norm_case(oracle=lambda given, found: 2 * rms_norm(*given))
    assert wrong(judge(case, rms_norm.reference, "reference")) == {"oracle"}


def test_properties_have_limits_or_are_reported() -> None:
    from dsv4.check.contract import Property

    case = norm_case(properties=lambda given, found: [Property("size", 3.0, 2.0), Property("shape", 3.0, None)])
    assert {v.leaf: v.ok for v in judge(case, normed) if v.check == "property"} == {"size": False, "shape": True}


def test_no_case_is_listed_twice() -> None:
    labels = [case.label for case in cases()]
    assert len(labels) == len(set(labels))
    assert len(labels) > 400


# --- fences -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, torch.float32, torch.int64, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("size", "stride"), [((3, 5), (5, 1)), ((3, 5), (8, 1)), ((2, 3), (9, 2)), ((), ()), ((0, 4), (4, 1))]
)
def test_a_fence_sees_every_byte_but_the_tensors_own(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> None:
    one = fence(size, stride, dtype, "cpu")
    assert (tuple(one.view.shape), one.view.stride()) == (size, stride)
    assert one.view.data_ptr() % 64 == 0 or not one.view.numel()
    assert one.trespass() == 0
    one.view.copy_(torch.ones(size).to(dtype))
    assert one.trespass() == 0
    own = one.view.numel() * one.view.element_size()
    one.run.fill_(0)
    assert one.trespass() == one.run.numel() - own


def test_a_fence_is_made_of_nan() -> None:
    one = fenced(torch.ones(2, 3)[:, ::2], "cpu")
    assert one.view.tolist() == [[1, 1], [1, 1]]
    assert one.view.as_strided((4,), (1,), one.view.storage_offset() - 2).isnan().tolist() == [True, True, False, True]
    assert one.run.numel() > 2 * GUARD


def test_what_is_allocated_lies_between_fences() -> None:
    like = torch.ones(3, dtype=HALF)
    with Allocations() as made:
        empty = [torch.empty(2, 3), torch.empty_like(like), like.new_empty(4), torch.empty_strided((2, 2), (4, 1))]
        zeroed = [torch.zeros(3), torch.zeros_like(like), like.new_zeros(2)]
    assert len(made.fences) == 7
    assert all(bool(x.isnan().all()) for x in empty)
    assert all(not x.any() for x in zeroed)
    assert all(one.trespass() == 0 for one in made.fences)


def test_tensors_are_changed_wherever_they_are() -> None:
    q = NVFP4.encode(torch.ones(1, 16))
    value = (q, Mixed(*(torch.ones(n) for n in range(4))), None, "row", 1.0)
    seen: list[Tensor] = []
    changed = transform(value, lambda x: seen.append(x) or x.clone())  # type: ignore[func-returns-value]
    assert len(seen) == 3 + 4
    assert type(changed[1]) is Mixed
    assert changed[2:] == (None, "row", 1.0)


# --- metrics ----------------------------------------------------------------------------------------------------------


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
    assert replace(norm_case(), name="x").label == "rms_norm: x"
