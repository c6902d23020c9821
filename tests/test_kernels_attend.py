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
