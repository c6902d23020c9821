"""Attention's kernel on this CPU, in every form: clusters, copies and tensor cores as the PTX manual has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.check.cases import attend as listed
from dsv4.check.contract import placed
from dsv4.check.metrics import differing
from dsv4.kernels import attention
from dsv4.kernels.attention import Plan, plan
from dsv4.ops.attention import attend
from tests import shim
from tests.shim.build import on_hopper
from tests.shim.everyday import played, problems

WHOLE = 227 << 10  # bytes of shared memory that a block can have
SMALL = [
    label
    for label, case in played("attend", "attend_quant").items()
    if case.size == "small" and case.name != "no token"
]
LONG = ("more chunks than strands", "32 heads")  # seconds each
FULL = [label for label, case in played("attend", "attend_quant").items() if case.size == "full"]


@pytest.mark.parametrize(
    "label", [pytest.param(one, marks=[pytest.mark.slow] * any(name in one for name in LONG)) for one in SMALL]
)
def test_a_case(label: str) -> None:
    """Memory, the same bits in another order of threads, a token alone, reference and oracle."""
    assert problems(label) == []


@pytest.mark.slow
@pytest.mark.parametrize("label", FULL)
def test_a_case_of_full_size(label: str) -> None:
    assert problems(label) == []


def test_no_token_is_no_launch() -> None:
    with shim.machine(csrc=on_hopper(), clusters=True):
        assert attend.implementations["fused"].run(*played()["attend: no token"].make()).shape == (0, 4, 512)


def forms(entries: int) -> list[Plan]:
    """All that `plan` may choose from, and clusters of other sizes."""
    chunks = -(-entries // 64)
    sizes = [1, *(pairs for pairs in range(2, 9) if 2 * pairs - 1 <= min(chunks, 32))]
    made = [attention.form(heads, pairs, chunks) for heads in (16, 32, 64) for pairs in sizes]
    return [form for form in made if form]


def in_form(form: Plan, given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, order: int = 0) -> Tensor:
    monkeypatch.setattr(attention, "plan", lambda *sizes: form)
    with shim.machine(order=order, csrc=on_hopper(), clusters=True):
        return attend.implementations["fused"].run(*given)


FORMS = (
    ("32 heads, 64 + 70 rows", 6),
    ("absent entries", 6),
    pytest.param("a token without entries", 5, marks=pytest.mark.slow),
    pytest.param("huge scores", 5, marks=pytest.mark.slow),
    pytest.param("more chunks than strands", 4, marks=pytest.mark.slow),
    pytest.param("32 heads, 128 + 1024 rows", 10, marks=pytest.mark.slow),
)


DECODED = (
    "16 heads, 128 + 0 rows",
    "32 heads, 64 + 70 rows",
    "absent entries",
    pytest.param("more chunks than strands", marks=pytest.mark.slow),
    pytest.param("64 heads, 128 + 512 rows", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("name", DECODED)
def test_rows_that_were_decoded_before_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every form that there is for them."""
    make = played()[f"attend: {name}"].make
    given, wide = make(), listed.decoding(make)()
    with shim.machine(csrc=on_hopper(), clusters=True) as ran:
        found = attend.implementations["fused"].run(*given)
    assert set(ran) == {"attend_tiles"}
    chunks = -(-(given[2].shape[1] + given[4].shape[1]) // 64)
    made = [attention.form(heads, pairs, chunks, wide=True) for heads in (16, 32, 64) for pairs in (1, 2)]
    chosen = [form for form in made if form and 2 * form.pairs - 1 <= chunks]
    assert len(chosen) > (0 if chunks > 32 else 2)
    for number, form in enumerate(chosen):
        other = in_form(form, wide, monkeypatch, shim.ORDERS[number % 3])
        assert differing(found, other) == 0, form


@pytest.mark.parametrize(("name", "least"), FORMS)
def test_no_form_changes_a_bit(name: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 and of 32 heads, strands on one block and on many, in three orders of the threads."""
    given = played()[f"attend: {name}"].make()
    chosen = forms(given[2].shape[1] + given[4].shape[1])
    assert len(chosen) >= least
    found = [in_form(form, given, monkeypatch, shim.ORDERS[number % 3]) for number, form in enumerate(chosen)]
    assert [form for form, one in zip(chosen, found, strict=True) if differing(one, found[0])] == []


@pytest.mark.parametrize("more", [60, *(pytest.param(more, marks=pytest.mark.slow) for more in (1, 300, 2500))])
def test_absent_entries_behind_change_no_bit(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the longest sequence of a step says how long all lists are: other chunks, strands and blocks."""
    q, near, near_rows, far, far_rows, *rest = played()["attend: rows listed twice"].make()
    entries = near_rows.shape[1] + far_rows.shape[1]
    wanted = in_form(forms(entries)[0], (q, near, near_rows, far, far_rows, *rest), monkeypatch)
    longer = torch.nn.functional.pad(far_rows, (0, more), value=-1)
    for form in forms(entries + more)[:: 3 if more < 1000 else 9]:
        assert not differing(in_form(form, (q, near, near_rows, far, longer, *rest), monkeypatch), wanted)


@pytest.mark.parametrize("heads", [4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("entries", [1, 128, 192, 640, 1152, 2048, 2049, 8320])
def test_every_plan_fits(heads: int, entries: int) -> None:
    """For one token and for thousands: shared memory, strands of a stream, and a cluster's size."""
    strands = min(-(-entries // 64), 32)
    for tokens in (1, 2, 5, 16, 64, 500, 8192):
        form = plan(tokens, heads, entries, 132)
        assert form.smem <= WHOLE
        assert form.slots <= 2
        assert form.pairs == 1 or (form.pairs <= min(strands, 8) and 2 * form.pairs * form.slots >= strands)


def test_one_token_spreads_and_many_do_not() -> None:
    assert plan(1, 64, 640, 132) == Plan(16, 5, 1, 3, 3)
    assert plan(1, 64, 8320, 132) == Plan(16, 8, 2, 3, 2)
    assert plan(1, 128, 1152, 132) == Plan(32, 5, 2, 2, 2)
    assert plan(64, 64, 640, 132) == Plan(64, 1, 1, 3, 3)
    assert plan(64, 128, 1152, 132) == Plan(64, 1, 1, 3, 3)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "entries"), [(4, 130), (8, 640), (64, 640), (64, 192), (128, 1152), (16, 2200)])
def test_no_form_and_no_company_changes_a_bit_on_a_gpu(
    heads: int, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of lists that are longer than they have entries."""
    q, near, near_rows, far, far_rows, sink, by = placed(
        listed.given(9, heads, 100, entries - 100), torch.device("cuda")
    )
    far_rows[3, 7:] = far_rows[5, ::3] = -1
    run = attend.implementations["fused"].run
    whole = run(q, near, near_rows, far, far_rows, sink, by)
    assert whole.isfinite().all()
    for start, count in ((0, 1), (3, 1), (8, 1), (2, 5)):
        rows = slice(start, start + count)
        turn = type(by)(by.cos[rows], by.sin[rows])
        assert not differing(run(q[rows], near, near_rows[rows], far, far_rows[rows], sink, turn), whole[rows])
    longer = torch.nn.functional.pad(far_rows, (0, 700), value=-1)
    assert not differing(run(q, near, near_rows, far, longer, sink, by), whole)
    for form in forms(entries):
        monkeypatch.setattr(attention, "plan", lambda *sizes, form=form: form)
        assert not differing(run(q, near, near_rows, far, far_rows, sink, by), whole), form
