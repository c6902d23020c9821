"""Query heads straight from their matrix, played on this CPU in clusters: the bits of two kernels."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4 import kernels
from dsv4.check.cases import linear_heads as listed
from dsv4.check.cases.inputs import BF16, FP32
from dsv4.check.contract import Case, judge, placed
from dsv4.check.metrics import differing
from dsv4.kernels import linear, linear_wide
from dsv4.kernels import linear_heads as forms
from dsv4.ops.linear import scaled_matmul
from dsv4.ops.linear_heads import scaled_matmul_q_norm_rope
from dsv4.ops.rope import q_norm_rope
from dsv4.quant.tensor import QTensor
from tests import shim
from tests.shim.build import on_hopper

kernels.install()
CASES = {case.name: case for case in listed.cases() if not case.refusable}
SMALL = [name for name, case in CASES.items() if case.size == "small"]
# What a CPU has patience for: the other cases of these sizes are of more heads, or run by two kernels.
LARGE = [name for name, case in CASES.items() if case.size == "full" and re.match(r"(7|16|17|32) x", name)]
ROOMS = {8: {8: 99}, 4: {4: 99}, 2: {2: 99}, 1: {1: 99}}  # by the blocks of a cluster that follow
run = scaled_matmul_q_norm_rope.implementations["fused"].run


def two_kernels(x: QTensor, weight: QTensor, heads: int, eps: float, turn: Any, dtype: torch.dtype) -> torch.Tensor:
    product = scaled_matmul.implementations["fused"].run(x, weight, dtype)
    return q_norm_rope.implementations["fused"].run(product.unflatten(1, (heads, -1)), eps, turn)


def wrong(case: Case, csrc: Path, order: int | None = None) -> list[str]:
    with shim.machine(order=order, csrc=csrc, clusters=True):
        verdicts = judge(case, run, twin=two_kernels)
    return [f"{v.check} {v.leaf} {v.distance}" for v in verdicts if not v.ok]


@pytest.mark.parametrize("name", SMALL)
def test_a_case(name: str) -> None:
    assert wrong(CASES[name], on_hopper()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "order"), list(zip(LARGE, cycle(shim.ORDERS), strict=False)))
def test_a_large_case_in_one_order_or_another(name: str, order: int) -> None:
    assert wrong(CASES[name], on_hopper(), order) == []


@pytest.mark.parametrize("blocks", ROOMS)
def test_no_cluster_changes_a_bit(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head in eight blocks, four, two or one; as soon as there are more tokens than a kernel has, the next one."""
    monkeypatch.setattr(forms, "_ROOM", ROOMS[blocks])
    forms.form.cache_clear()
    for tokens, dtype in ((2, BF16), (9, FP32)):
        given = listed._given(tokens, 2, 256, dtype)
        assert forms.form(2, 256, 8, 2).cluster == blocks
        with shim.machine(csrc=on_hopper(), clusters=True) as ran:
            assert differing(run(*given), two_kernels(*given)) == 0
        assert ran[0] == f"linear_heads_{'bf16' if dtype == BF16 else 'float'}_{8 if tokens < 9 else 16}"
    forms.form.cache_clear()


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 64])
def test_what_a_number_of_tokens_is_run_by(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel up to 32; the two behind it, of which nothing here plays the first."""
    products: list[int] = []
    monkeypatch.setattr(linear_wide, "launch", lambda x, *given: products.append(len(x)))
    with shim.machine(idle=True, csrc=on_hopper()) as ran:
        run(*listed._given(tokens, 4, 128, BF16))
    if tokens > 32:
        assert (products, ran) == ([tokens], ["q_norm_rope_bf16_2"])
    else:
        assert (products, ran) == ([], [f"linear_heads_bf16_{next(t for t in (8, 16, 32) if t >= tokens)}"])


SHAPES = listed.SHAPES | listed.SLICES


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_matrix_of_the_releases_fits(shape: tuple[int, int]) -> None:
    heads, columns = shape
    assert linear.form(heads * 512, columns).segments == 1
    for tokens in linear.TOKENS:
        form = forms.form(heads, columns, tokens, 2)
        assert form.cluster * form.turns == 8
        assert form.cluster <= 4 or heads * form.cluster <= linear.MULTIPROCESSORS
        assert 64 <= heads * form.cluster <= 2 * linear.MULTIPROCESSORS
        assert 4 <= form.stages <= 10
        assert form.smem + 1024 <= 114 << 10  # two to a multiprocessor
        assert forms.form(heads, columns, tokens, 4).smem <= 227 << 10


SOURCE, PRODUCT, THREE = "linear_heads.cu", "common/linear_few.cuh", "3 x 2 heads x 384 bf16"
BUGS = {
    "sums of another order": ("common/reduce.cuh", "v[2]) + (v[1]", "v[1]) + (v[2]", "8 x 4 heads x 256 fp32"),
    "squares of the last tile alone": (SOURCE, "(top + turn) * TILE_EIGHTS", "turn * TILE_EIGHTS", THREE),
    "squares before they have come": (SOURCE, "barriers.sent.wait_cluster(0);", "", THREE),
    "another head's columns": (SOURCE, "head * HEAD_TILES + top", "top", THREE),
    "the rotation of another token": (SOURCE, "by.angles(token, turned)", "by.angles(0, turned)", THREE),
    "a product cut off": (SOURCE, "narrow<T>(sum[i]);", "{static_cast<u16>(__float_as_uint(sum[i]) >> 16)};", THREE),
    "scales of the wrong rows": (PRODUCT, "tile_of(i / count) / 2", "tile_of(i / count) / 4", THREE),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, tmp_path: Path) -> None:
    file, right, planted, name = BUGS[bug]
    csrc = Path(shutil.copytree(on_hopper(), tmp_path / "csrc"))
    text = (csrc / file).read_text()
    assert text.count(right) == 1
    (csrc / file).write_text(text.replace(right, planted))
    with suppress(shim.Fault):
        assert wrong(CASES[name], csrc) != []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", [(64, 1024), (128, 1536), (8, 1024), (3, 384)])
def test_heads_have_the_bits_of_two_kernels(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """At every number of tokens that either of them takes, and each token those that it has alone."""
    x, weight, heads, eps, turn, _ = placed(listed._given(40, *shape, dtype), torch.device("cuda"))
    part = [(QTensor(x.data[:n], x.scale[:n], x.format), type(turn)(turn.cos[:n], turn.sin[:n])) for n in range(41)]
    whole = two_kernels(x, weight, heads, eps, turn, dtype)
    for tokens in range(1, 41):
        rows, by = part[tokens]
        assert differing(run(rows, weight, heads, eps, by, dtype), whole[:tokens]) == 0, tokens
