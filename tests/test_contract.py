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
from dsv4.check.metrics import Bound
from dsv4.errors import KernelError
from dsv4.ops.norm import rms_norm
from dsv4.ops.op import Implementation
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import FP8_ROW

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


def test_a_case_is_labelled_by_op_and_name() -> None:
    assert replace(norm_case(), name="x").label == "rms_norm: x"
