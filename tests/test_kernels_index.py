"""Index logits' kernel on this CPU, in every form: copies and tensor cores as the PTX manual has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.check.cases import index as listed
from dsv4.check.contract import placed
from dsv4.check.metrics import differing
from dsv4.kernels import index_logits as forms
from dsv4.kernels.index_logits import Plan, plan
from dsv4.kernels.matmul import Machine
from dsv4.ops.index_logits import index_logits
from dsv4.quant.index_keys import KEY_LAYOUTS, KeyLayout
from tests import shim
from tests.shim.build import on_hopper
from tests.shim.everyday import played, problems

HOPPER, SMALLEST = Machine(132, 228 << 10), Machine(170, 100 << 10)
SMALL = [label for label, case in played("index_logits").items() if case.size == "small" and "no token" not in label]
FULL = [label for label, case in played("index_logits").items() if case.size == "full"]
BOTH = pytest.mark.parametrize("layout", KEY_LAYOUTS.values(), ids=lambda one: one.name)
EVERYWHERE = pytest.mark.parametrize("hopper", [True, False], ids=["hopper", "elsewhere"])


@pytest.fixture(autouse=True)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test says which it is, kernels are those of Hopper or of the others."""
    if "hopper" in request.fixturenames:
        hopper = request.getfixturevalue("hopper")
        monkeypatch.setattr(forms, "on_hopper", lambda device: hopper)


@pytest.mark.parametrize("label", SMALL)
@pytest.mark.parametrize("hopper", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["hopper", "elsewhere"])
def test_a_case(hopper: bool, label: str) -> None:
    """Memory, the same bits in another order of threads, a token alone, reference and oracle."""
    assert problems(label) == []


@pytest.mark.slow
@pytest.mark.parametrize("label", FULL)
@EVERYWHERE
def test_a_case_of_full_size(hopper: bool, label: str) -> None:
    assert problems(label) == []


@BOTH
def test_no_token_and_no_place_is_no_launch(layout: KeyLayout) -> None:
    given = listed.given(layout, 1, 64, 32)
    run = index_logits.implementations["fused"].run
    with shim.machine(csrc=on_hopper()) as ran:
        assert run(*given[:7], 0).shape == (1, 0)
        assert run(*listed.given(layout, 0, 64, 32)).shape == (0, 64)
    assert not ran


def in_form(near: int, spans: int, given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, order: int = 0) -> Tensor:
    """With so many tokens a block and so many blocks side by side on keys."""
    layout = forms.layout_of(given[0])
    launch = Plan(near, -(-len(given[0]) // near), spans, forms.form_of(layout, given[0].device).team)
    monkeypatch.setattr(forms, "plan", lambda *sizes: launch)
    with shim.machine(order=order, csrc=on_hopper()):
        return index_logits.implementations["fused"].run(*given)


@pytest.mark.parametrize("case", ["sequences in turn, the longest not first", "one sequence, each token sees one more"])
@BOTH
@EVERYWHERE
def test_no_form_changes_a_bit(hopper: bool, layout: KeyLayout, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = played()[f"index_logits: {layout.name} {case}"].make()
    wanted = in_form(1, 1, given, monkeypatch)
    assert wanted.isfinite().any()
    for near, spans, order in ((2, 2, 1), (4, 1, 5), (3, 2, 0)):
        assert not differing(in_form(near, spans, given, monkeypatch, order), wanted), (near, spans)


@BOTH
@EVERYWHERE
def test_a_ring_goes_round(hopper: bool, layout: KeyLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block for more stages than the ring has, and for a second sequence behind them."""
    *rows, table, _, visible, width = listed.given(layout, 2, 2240 if hopper else 1216, 32)
    given = (*rows, torch.cat((table, table.flip(1))), torch.tensor([0, 1]), visible, width)
    wanted = in_form(1, 3, given, monkeypatch)
    assert not differing(in_form(2, 1, given, monkeypatch, 1), wanted)


@pytest.mark.parametrize("team", [1, 2])
@BOTH
def test_fewer_warpgroups_change_no_bit(layout: KeyLayout, team: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = listed.given(layout, 3, 832, 32)
    wanted = in_form(1, 1, given, monkeypatch)
    fewer = forms._HOPPER[layout.name]._replace(team=team)
    monkeypatch.setattr(forms, "form_of", lambda *given: fewer)
    assert not differing(in_form(2, 2, given, monkeypatch, 1), wanted)


@BOTH
@EVERYWHERE
def test_a_page_of_four_keys(hopper: bool, layout: KeyLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest: as many as the lanes of a quad bring at once on Hopper. Smaller ones are refused."""
    given = listed.given(layout, 2, 192, 4)
    wanted = index_logits.reference(*given)
    torch.testing.assert_close(in_form(1, 1, given, monkeypatch), wanted, rtol=1e-5, atol=1e-5)
    with shim.posing():
        accepts = index_logits.implementations["fused"].accepts
        assert accepts(*given) is None
        assert "has 2 keys" in str(
            accepts(*given[:3], torch.zeros(9, layout.page_bytes(2), dtype=torch.uint8), *given[4:])
        )


@pytest.mark.parametrize("more", [64, 320])
@BOTH
@EVERYWHERE
def test_a_greater_width_changes_no_bit(
    hopper: bool, layout: KeyLayout, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the longest sequence of a step says how wide all rows are."""
    *rest, width = listed.given(layout, 3, 192, 32)
    wanted = in_form(1, 1, (*rest, width), monkeypatch)
    found = in_form(1, 2, (*rest, width + more), monkeypatch)
    assert not differing(found[:, :width].contiguous(), wanted)
    assert (found[:, width:] == -torch.inf).all()


@pytest.mark.parametrize("machine", [HOPPER, SMALLEST])
@BOTH
def test_every_plan_fits(layout: KeyLayout, machine: Machine) -> None:
    """For one token and for thousands: shared memory, and a block for every token and key."""
    hopper = (forms._HOPPER[layout.name],) if machine == HOPPER else ()
    for form in (forms._WIDE[layout.name], *hopper):
        for tokens in (1, 2, 7, 64, 1024, 8192):
            for sequences in (1, 3, 64):
                for width in (64, 192, 2048, 65_536, 262_144):
                    launch = plan(layout, form, tokens, sequences, width, machine)
                    assert launch.near in (1, 2, 4)
                    assert launch.groups == -(-tokens // launch.near)
                    assert 1 <= launch.spans <= -(-width // form.tile)
                    assert launch.team in (form.team, min(form.team, 2))
                    smem = forms.shared(layout, form, launch.team, launch.near)
                    assert smem + 2048 <= min(machine.shared, 228 << 10) - 1024


def test_one_token_spreads_and_tokens_of_one_prompt_share() -> None:
    (fp4, fp8), wide, hopper = KEY_LAYOUTS.values(), forms._WIDE, forms._HOPPER
    assert plan(fp4, hopper["fp4"], 1, 64, 2048, HOPPER) == (1, 1, 16, 2)
    assert plan(fp4, hopper["fp4"], 1, 64, 8192, HOPPER) == (1, 1, 64, 4)
    assert plan(fp4, hopper["fp4"], 1, 64, 262_144, HOPPER) == (1, 1, 132, 4)
    assert plan(fp4, hopper["fp4"], 64, 64, 65_536, HOPPER) == (1, 64, 2, 4)
    assert plan(fp8, hopper["fp8"], 1024, 64, 8192, HOPPER) == (4, 256, 1, 4)
    assert plan(fp4, wide["fp4"], 1, 64, 262_144, HOPPER) == (1, 1, 528, 1)
    assert plan(fp4, wide["fp4"], 64, 64, 65_536, HOPPER)[:2] == (1, 64)
    assert plan(fp4, wide["fp4"], 1024, 64, 8192, HOPPER).near == 4
    assert plan(fp8, wide["fp8"], 1024, 64, 8192, HOPPER).near == 2


@pytest.mark.gpu
@BOTH
def test_no_form_and_no_company_changes_a_bit_on_a_gpu(layout: KeyLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in rows that are wider than any sequence is long."""
    made = placed(listed.given(layout, 37, 5056, 32), torch.device("cuda"))
    *rows, pages, table, slots, visible, width = made
    run = index_logits.implementations["fused"].run
    whole = run(*made)
    assert whole[:, 0].isfinite().all()
    for start, count in ((0, 1), (3, 1), (36, 1), (4, 8)):
        own = slice(start, start + count)
        part = run(*(x[own] for x in rows), pages, table, slots[own], visible[own], width + 4096)
        assert not differing(part[:, :width].contiguous(), whole[own])
        assert (part[:, width:] == -torch.inf).all()
    most = forms.form_of(layout, made[0].device).team
    for near, spans, team in ((1, 1, most), (2, 7, 1), (3, 40, most), (4, 3, min(most, 2))):
        launch = Plan(near, -(-37 // near), spans, team)
        monkeypatch.setattr(forms, "plan", lambda *sizes, launch=launch: launch)
        assert not differing(run(*made), whole), launch
