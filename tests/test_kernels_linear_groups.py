"""Products of tensor cores in BF16, played on this CPU: dense ones, and groups of columns with their own matrices."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4 import kernels
from dsv4.check.cases import grouped, matmul
from dsv4.check.cases.inputs import BF16, normal
from dsv4.check.contract import Case, judge
from dsv4.check.metrics import differing
from dsv4.kernels import linear_grouped
from dsv4.kernels import matmul as forms
from dsv4.ops.linear import grouped_linear
from dsv4.ops.linear_grouped import grouped_linear_quant
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import FP8_ROW, Format
from dsv4.quant.tensor import QTensor
from tests import shim
from tests.shim.build import on_hopper

kernels.install()
CASES = {f"grouped {case.name}": case for case in grouped.cases() if case.op is grouped_linear and not case.refusable}
CASES |= {
    f"stored {case.name}": case for case in grouped.cases() if case.op is grouped_linear_quant and not case.refusable
}
CASES |= {f"dense {case.name}": case for case in matmul.cases()}
SMALL = [name for name, case in CASES.items() if case.size == "small" and not name.startswith("dense")]
DENSE = ["dense 2 x 20 x 136 bf16", "dense 7 x 100 x 264 bf16", "dense padded rows of boxes bf16"]
LARGE = [
    name for name, case in CASES.items() if re.match("grouped (3|40|65) x|stored 3 x", name)
]  # what a CPU has patience for


@pytest.fixture
def played() -> Path:
    return on_hopper()


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "machine_of", lambda device: forms.Machine(3, 228 << 10))


def two_kernels(x: Tensor, weight: Tensor | QTensor, fmt: Format) -> QTensor:
    product = grouped_linear.implementations["fused"].run(x, weight)
    return quantize.implementations["fused"].run(product, fmt)


def wrong(case: Case, csrc: Path, order: int = 0) -> list[str]:
    twin, processors = (two_kernels, 132) if case.op is grouped_linear_quant else (None, 3)  # clusters, and long walks
    with shim.machine(order=order, csrc=csrc, clusters=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "machine_of", lambda device: forms.Machine(processors, 228 << 10))
        found = judge(case, case.op.implementations["fused"].run, twin=twin)
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
            bytes_form = linear_grouped.form(rows, columns, tokens, machine, stored)
            if bytes_form is not None:
                assert bytes_form.cluster * bytes_form.turns == 8
                assert rows // 128 * bytes_form.cluster <= 2 * machine.processors
                assert 1 <= bytes_form.stages <= 24
                assert bytes_form.smem + 1024 <= most
        for tokens in (9, 17, 40, 128):
            _, stages, smem = forms.many(tokens, columns, machine, stored)
            assert 2 <= stages <= 16
            assert smem + 1024 <= most


@pytest.mark.parametrize(("processors", "cluster"), [(132, 8), (10, 4), (4, 2), (2, 1)])
def test_no_cluster_changes_a_byte(
    processors: int, cluster: int, played: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 rows in eight blocks, four, two or one; tokens of one kernel, and of several blocks side by side."""
    machine = forms.Machine(processors, 228 << 10)
    monkeypatch.setattr(forms, "machine_of", lambda device: machine)
    for tokens, parts, stored in ((1, 1, True), (7, 1, False), (8, 1, True), (9, 2, True), (17, 3, False)):
        x, weight = grouped._wide(tokens, 512, 256, 2, stored)
        form = linear_grouped.form(512, 256, tokens, machine, forms.STORED[forms.kind_of(weight)])
        assert form is not None
        assert form.cluster == cluster if parts == 1 else form.cluster <= cluster
        with shim.machine(csrc=played, clusters=True) as ran:
            found = grouped_linear_quant.implementations["fused"].run(x, weight, FP8_ROW)
            assert ran == [f"grouped_quant_{'e4m3' if stored else 'bf16'}"]
            wanted = two_kernels(x, weight, FP8_ROW)
        assert torch.equal(found.data.view(torch.uint8), wanted.data.view(torch.uint8)), tokens
        assert torch.equal(found.scale, wanted.scale), tokens


def test_many_tokens_are_stored_by_two_kernels(played: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the form for few does not take them."""
    monkeypatch.setattr(forms, "_PASSES", 0)
    for tokens in (8, 9, 33):
        x, weight = grouped._wide(tokens, 256, 128, 2, True)
        with shim.machine(csrc=played, idle=True) as ran:
            grouped_linear_quant.implementations["fused"].run(x, weight, FP8_ROW)
        many = [f"grouped_many_e4m3_{16 if tokens <= 16 else 64}", "quantize_fp8_row_bf16_1"]
        assert ran == (["grouped_quant_e4m3"] if tokens == 8 else many)


def test_a_group_does_not_read_the_columns_of_another(played: Path) -> None:
    """Where the others' are NaN, none of its numbers is."""
    x, weight = normal("x", 3, 2, 256, dtype=BF16), matmul.weights(256, 256, BF16)
    x[:, 1] = torch.nan
    with shim.machine(csrc=played):
        found = grouped_linear.implementations["fused"].run(x, weight)
    assert found[:, :128].isfinite().all()
    assert found[:, 128:].isnan().all()


STORED = "stored 5 x 3 of 256 x 256 fp8"
NINE, THREE = "grouped 9 x 1 of 256 x 640 fp8", "grouped 5 x 3 of 256 x 256 fp8"
BUGS = {
    "the largest of one block": ("grouped_quant.cu", "from < size", "from < 1", STORED),
    "the largest of another token": ("grouped_quant.cu", "kept.tops[from][token]", "kept.tops[from][0]", STORED),
    "largest before they have come": ("grouped_quant.cu", "kept.sent.wait_cluster(0);", "", STORED),
    "scales of the first rows": ("grouped_quant.cu", "+ block] =", "] =", STORED),
    "a scale of the wrong columns": ("common/matmul_few.cuh", "min(first + c, boxes - 1)", "first", NINE),
    "the first group's columns": ("common/matmul_few.cuh", "static_cast<i64>(work.group) * s.columns", "0", THREE),
    "a chain that goes on": ("common/matmul_few.cuh", "d[0] = d[1] = d[2] = d[3] = 0;", "", NINE),
    "NaN as 480": ("common/matmul_few.cuh", "__any_sync(ALL_LANES, broken)", "false", "grouped odd rows, odd codes"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("shape", [(8192, 4096, 8), (2048, 4096, 2), (384, 640, 3)])
def test_bytes_are_those_of_two_kernels(shape: tuple[int, int, int], stored: bool) -> None:
    """At every number of tokens that one kernel takes, and behind it."""
    x, weight = grouped._wide(40, *shape, stored)
    x, weight = x.cuda(), weight.to("cuda")
    for tokens in range(1, 41):
        found = grouped_linear_quant.implementations["fused"].run(x[:tokens], weight, FP8_ROW)
        wanted = two_kernels(x[:tokens], weight, FP8_ROW)
        assert torch.equal(found.data.view(torch.uint8), wanted.data.view(torch.uint8)), tokens
        assert torch.equal(found.scale, wanted.scale), tokens
