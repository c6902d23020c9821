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


@pytest.mark.parametrize("label", SMALL)
def test_a_case(label: str) -> None:
    """Memory, the same bits in another order of threads, a token alone, reference and oracle."""
    assert problems(label) == []


@pytest.mark.slow
@pytest.mark.parametrize("label", FULL)
def test_a_case_of_full_size(label: str) -> None:
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
    one = plan(layout, 1, 1, 64, HOPPER)
    smem = one.smem + (near - one.near) * forms._OPERANDS
    form = Plan(near, -(-len(given[0]) // near), spans, smem)
    monkeypatch.setattr(forms, "plan", lambda *sizes: form)
    with shim.machine(order=order, csrc=on_hopper()):
        return index_logits.implementations["fused"].run(*given)


@pytest.mark.parametrize("case", ["sequences in turn, the longest not first", "one sequence, each token sees one more"])
@BOTH
def test_no_form_changes_a_bit(layout: KeyLayout, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = played()[f"index_logits: {layout.name} {case}"].make()
    wanted = in_form(1, 1, given, monkeypatch)
    assert wanted.isfinite().any()
    for near, spans, order in ((2, 2, 1), (4, 1, 5), (3, 2, 0)):
        assert not differing(in_form(near, spans, given, monkeypatch, order), wanted), (near, spans)


@BOTH
def test_a_ring_goes_round(layout: KeyLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block for more stages than the ring has, and for a second sequence behind them."""
    *rows, table, _, visible, width = listed.given(layout, 2, 1216, 32)
    given = (*rows, torch.cat((table, table.flip(1))), torch.tensor([0, 1]), visible, width)
    wanted = in_form(1, 3, given, monkeypatch)
    assert not differing(in_form(2, 1, given, monkeypatch, 1), wanted)


@pytest.mark.parametrize("more", [64, 320])
@BOTH
def test_a_greater_width_changes_no_bit(layout: KeyLayout, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for tokens in (1, 2, 7, 64, 1024, 8192):
        for sequences in (1, 3, 64):
            for width in (64, 192, 2048, 65_536, 262_144):
                form = plan(layout, tokens, sequences, width, machine)
                assert form.near in (1, 2, 4)
                assert form.groups == -(-tokens // form.near)
                assert 1 <= form.spans <= -(-width // 128)
                assert form.smem + 2048 <= min(machine.shared, 228 << 10) - 1024


def test_one_token_spreads_and_tokens_of_one_prompt_share() -> None:
    fp4, fp8 = KEY_LAYOUTS["fp4"], KEY_LAYOUTS["fp8"]
    assert plan(fp4, 1, 64, 262_144, HOPPER)[:3] == (1, 1, 512)
    assert plan(fp4, 64, 64, 65_536, HOPPER)[:2] == (1, 64)
    assert plan(fp4, 1024, 64, 8192, HOPPER).near == 4
    assert plan(fp8, 1024, 64, 8192, HOPPER).near == 2


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
    smem = plan(layout, 1, 1, 64, HOPPER).smem
    for near, spans in ((1, 1), (2, 7), (3, 40), (4, 3)):
        form = Plan(near, -(-37 // near), spans, smem + (near - 1) * forms._OPERANDS)
        monkeypatch.setattr(forms, "plan", lambda *sizes, form=form: form)
        assert not differing(run(*made), whole), form
