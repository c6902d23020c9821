"""Attention's kernel on this CPU: clusters, copies and tensor cores played as the PTX manual has them, in every form."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dsv4 import kernels
from dsv4.check.cases import attend as listed
from dsv4.check.contract import Case, judge
from dsv4.check.metrics import differing
from dsv4.kernels import attention
from dsv4.kernels.attention import Plan
from dsv4.ops.attention import attend
from tests import shim
from tests.shim.build import CSRC

kernels.install()
CASES = {case.label: case for case in listed.cases() if case.size in ("small", "full") and not case.refusable}
SMALL = [label for label, case in CASES.items() if case.size == "small"]


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, where the headers of the machine are those of tests/shim/hopper."""
    csrc = tmp_path_factory.mktemp("hopper") / "csrc"
    shutil.copytree(CSRC, csrc)
    for header in (Path(shim.__file__).parent / "hopper").iterdir():
        shutil.copy(header, csrc / "common" / header.name)
    return csrc


def wrong(case: Case, csrc: Path, order: int | None = None) -> list[str]:
    with shim.machine(order=order, csrc=csrc, clusters=True) as ran:
        found = judge(case, case.op.implementations["fused"].run)
    assert ran or not len(case.make()[0])
    return [f"{v.check} {v.leaf} {v.distance}" for v in found if not v.ok]


@pytest.mark.parametrize("label", SMALL)
def test_a_case(label: str, played: Path) -> None:
    assert wrong(CASES[label], played) == []


def forms(entries: int) -> list[Plan]:
    """All that `plan` may choose from, and clusters of other sizes."""
    strands = min(-(-entries // 64), 32)
    sizes = [blocks for blocks in range(2, 17) if -(-strands // blocks) <= 2 and blocks <= strands]
    alone = [1] if -(-entries // 64) <= 32 else []
    return [Plan(heads, blocks, -(-strands // blocks) if blocks > 1 else 1) for heads in (16, 32) for blocks in (*alone, *sizes)]


FORMS = ("attend: 32 heads, 64 + 70 rows", "attend: absent entries", "attend: a token without entries", "attend: huge scores")


def in_form(form: Plan, case: Case, csrc: Path, monkeypatch: pytest.MonkeyPatch, order: int = 0) -> torch.Tensor:
    monkeypatch.setattr(attention, "plan", lambda *sizes: form)
    with shim.machine(order=order, csrc=csrc, clusters=True):
        return attend.implementations["fused"].run(*case.make())


@pytest.mark.parametrize("label", FORMS)
def test_no_form_changes_a_bit(label: str, played: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 and of 32 heads, strands on one block and on many, in three orders of the threads."""
    case = CASES[label]
    entries = case.make()[2].shape[1] + case.make()[4].shape[1]
    found = [
        in_form(form, case, played, monkeypatch, shim.ORDERS[number % 3]) for number, form in enumerate(forms(entries))
    ]
    assert len(found) >= 6
    assert [number for number, one in enumerate(found) if differing(one, found[0])] == []
