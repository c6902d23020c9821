"""Products of tensor cores in BF16, played on this CPU: dense ones, and groups of columns with their own matrices."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import pytest
import torch

from dsv4 import kernels
from dsv4.check.cases import grouped, matmul
from dsv4.check.cases.inputs import BF16, normal
from dsv4.check.contract import Case, judge
from dsv4.check.metrics import differing
from dsv4.kernels import matmul as forms
from dsv4.ops.linear import grouped_linear
from tests import shim
from tests.shim.build import on_hopper

kernels.install()
CASES = {f"grouped {case.name}": case for case in grouped.cases() if case.op is grouped_linear and not case.refusable}
CASES |= {f"dense {case.name}": case for case in matmul.cases()}
SMALL = [name for name, case in CASES.items() if case.size == "small" and name.startswith("grouped")]
DENSE = ["dense 2 x 20 x 136 bf16", "dense 7 x 100 x 264 bf16", "dense padded rows of boxes bf16"]
LARGE = [name for name, case in CASES.items() if re.match("grouped (3|40|65) x", name)]  # what a CPU has patience for


@pytest.fixture
def played() -> Path:
    return on_hopper()


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "machine_of", lambda device: forms.Machine(3, 228 << 10))


def wrong(case: Case, csrc: Path, order: int = 0) -> list[str]:
    with shim.machine(order=order, csrc=csrc):
        found = judge(case, case.op.implementations["fused"].run)
    return [f"{v.check} {v.leaf} {v.distance}" for v in found if not v.ok]


@pytest.mark.parametrize("name", [*SMALL, *DENSE])
def test_a_case(name: str, played: Path) -> None:
    assert wrong(CASES[name], played) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "order"), list(zip(LARGE, cycle(shim.ORDERS), strict=False)))
def test_a_large_case_in_one_order_or_another(name: str, order: int, played: Path) -> None:
    assert wrong(CASES[name], played, order) == []


@pytest.mark.slow
def test_both_forms_have_the_same_bits(played: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of every number of tokens, and each token alone by the form for few."""
    x, weight = grouped._wide(70, 256, 384, 2, True)
    run = grouped_linear.implementations["fused"].run
    with shim.machine(csrc=played):
        alone = torch.cat([run(row, weight) for row in x[:20].split(1)])
        monkeypatch.setattr(forms, "_PASSES", 0)
        for tokens in (9, 20, 40, 70):
            found = run(x[:tokens], weight)[:20]
            assert differing(found, alone[: len(found)]) == 0, tokens


@pytest.mark.parametrize("machine", [forms.Machine(132, 228 << 10), forms.Machine(170, 100 << 10)])
@pytest.mark.parametrize("shape", (grouped.SHAPES | grouped.SLICES).values(), ids=grouped.SHAPES | grouped.SLICES)
def test_every_form_fits(shape: tuple[int, int, int], machine: forms.Machine) -> None:
    (rows, columns, groups), most = shape, machine.shared - 1024
    for stored in (forms._BF16, forms._E4M3):
        for tokens in range(1, 9):
            form = forms.few(16, rows, columns, tokens, machine, stored, groups)
            if form is not None:
                assert form.blocks % groups == 0
                assert 1 <= form.stages <= 24
                assert form.smem + 1024 <= most
            assert form is not None or machine.shared == 100 << 10
        for tokens in (9, 17, 40, 128):
            _, stages, smem = forms.many(tokens, columns, machine, stored)
            assert 2 <= stages <= 16
            assert smem + 1024 <= most


def test_a_group_does_not_read_the_columns_of_another(played: Path) -> None:
    """Where the others' are NaN, none of its numbers is."""
    x, weight = normal("x", 3, 2, 256, dtype=BF16), matmul.weights(256, 256, BF16)
    x[:, 1] = torch.nan
    with shim.machine(csrc=played):
        found = grouped_linear.implementations["fused"].run(x, weight)
    assert found[:, :128].isfinite().all()
    assert found[:, 128:].isnan().all()


NINE, THREE = "grouped 9 x 1 of 256 x 640 fp8", "grouped 5 x 3 of 256 x 256 fp8"
BUGS = {
    "a scale of the wrong columns": ("common/matmul_few.cuh", "min(first + c, boxes - 1)", "first", NINE),
    "the first group's columns": ("common/matmul_few.cuh", "static_cast<i64>(group) * s.columns", "0", THREE),
    "a chain that goes on": ("common/matmul_few.cuh", "d[0] = d[1] = d[2] = d[3] = 0;", "", NINE),
    "NaN as 480": ("common/weights.cuh", "+ 0x01010101u & 0x80808080u)", "& 0)", "grouped odd rows, odd codes"),
    "columns in another order": ("common/weights.cuh", "2 * t + j", "2 * t", "grouped 1 x 2 of 128 x 128 fp8"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, played: Path, tmp_path: Path) -> None:
    file, right, planted, name = BUGS[bug]
    csrc = tmp_path / "csrc"
    shutil.copytree(played, csrc)
    text = (csrc / file).read_text()
    assert right in text
    (csrc / file).write_text(text.replace(right, planted))
    with suppress(shim.Fault):
        assert wrong(CASES[name], csrc) != []


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [True, False])
def test_a_row_has_the_bits_that_it_has_alone(stored: bool) -> None:
    """At every number of tokens up to 130, and in the chunk of a prompt, on a slice of Flash."""
    x, weight = grouped._wide(700, 2048, 4096, 2, stored)
    x, weight = x.cuda(), weight.to("cuda")
    run = grouped_linear.implementations["fused"].run
    alone = torch.cat([run(row, weight) for row in x.split(1)])
    for tokens in (*range(2, 131), 300, 700):
        assert not differing(run(x[-tokens:], weight), alone[-tokens:]), tokens
