"""The router's kernel for few tokens on this CPU: cluster, copies and tensor cores as the PTX manual has them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4 import kernels
from dsv4.check.cases import route as listed
from dsv4.check.cases.inputs import BF16, normal
from dsv4.check.contract import Arguments, Case, judge, placed
from dsv4.check.metrics import differing
from dsv4.kernels import matmul, route
from dsv4.kernels.matmul import Machine
from dsv4.ops.moe import Route
from tests import shim
from tests.shim.build import on_hopper

kernels.install()
CASES = {case.name: case for case in listed.cases() if "BF16" in case.name}
MACHINE = Machine(132, 228 << 10)
FLASH = (256, 4096)


def run(name: str, *given: Any) -> Route:
    found: Route = listed.route.implementations[name].run(*given)
    return found


def wrong(case: Case, csrc: Path, order: int | None = None) -> list[str]:
    with shim.machine(order=order, csrc=csrc, clusters=True):
        found = judge(case, case.op.implementations["cluster"].run)
    return [f"{v.check} {v.leaf} {v.distance}" for v in found if not v.ok]


@pytest.mark.parametrize("name", CASES)
def test_a_case(name: str) -> None:
    """Memory, the same bits in another order of threads, a token alone, reference and oracle."""
    assert wrong(CASES[name], on_hopper()) == []


def drawn(tokens: int, experts: int, columns: int) -> Arguments:
    """Numbers whose sums are rounded."""
    x, gate = normal("x", tokens, columns, dtype=BF16), normal("gate", experts, columns, dtype=BF16, size=0.05)
    return x, gate, normal("bias", experts), None, 6, 1.5


@pytest.mark.parametrize(
    ("tokens", "experts", "columns"), [(3, 72, 776), pytest.param(1, *FLASH, marks=pytest.mark.slow)]
)
def test_the_bits_are_those_of_two_launches(
    tokens: int, experts: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "machine_of", lambda device: MACHINE)
    given = drawn(tokens, experts, columns)
    with shim.machine(csrc=on_hopper(), clusters=True) as ran:
        one, two = run("cluster", *given), run("fused", *given)
    assert ran == ["route_cluster", "matmul_few_8", "route_8"]
    assert [differing(a, b) for a, b in zip(one, two, strict=True)] == [0, 0]


KERNEL = "route_cluster.cu"
BUGS = {
    "columns of the wrong slice": (KERNEL, "(slice * SLICE_BOXES + i) * BOX_BYTES, row", "i * BOX_BYTES, row",
                                   "6 of 250, 8 tokens of BF16"),
    "tokens not awaited": (KERNEL, "  copies_done();\n", "", "6 of 256, 1 tokens of BF16"),
    "the last slice left out": (KERNEL, "slice < slices; slice++) sum", "slice < slices - 1; slice++) sum",
                                "6 of 256, 1 tokens of BF16"),
    "logits of all tokens to the first": (KERNEL, "row + r, of), __float", "row + r, 0), __float",
                                          "2 of 40, 2 tokens of BF16"),
    "a block chooses before all logits are there": (KERNEL, "own.got.wait_cluster(0);", "",
                                                    "2 of 40, 2 tokens of BF16"),
    "rows of the wrong place": (KERNEL, "own.logits + row + r", "own.logits + row + (r ^ 8)",
                                "2 of 40, 2 tokens of BF16"),
    "experts that there are not": (KERNEL, "of < tokens && row + r < count", "of < tokens", "8 of 8, 5 tokens of BF16"),
    "the first token's given experts for all": (KERNEL, "static_cast<i64>(rank) * k + threadIdx.x]", "threadIdx.x]",
                                                "2 of 40, 2 tokens of BF16, given"),
    "weights have the bias": ("common/route.cuh", "scores[e] = s;", "scores[e] = r.bias && there ? s + r.bias[e] : s;",
                              "2 of 40, 2 tokens of BF16"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, tmp_path: Path) -> None:
    file, right, planted, name = BUGS[bug]
    csrc = tmp_path / "csrc"
    shutil.copytree(on_hopper(), csrc)
    text = (csrc / file).read_text()
    assert right in text
    (csrc / file).write_text(text.replace(right, planted))
    with suppress(shim.Fault):
        assert wrong(CASES[name], csrc) != []


def refused(
    tokens: int, experts: int, columns: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = BF16
) -> bool:
    monkeypatch.setattr(route, "machine_of", lambda device: MACHINE)
    x, gate = (torch.empty(n, columns, dtype=dtype, device="meta") for n in (tokens, experts))
    with shim.posing():
        return listed.route.implementations["cluster"].accepts(x, gate, None, None, 6, 1.5) is not None


def test_what_fits_into_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [tokens for tokens in range(12) if not refused(tokens, *FLASH, monkeypatch)] == list(range(1, 9))
    assert refused(1, 384, 7168, monkeypatch)
    assert refused(1, 257, 4096, monkeypatch)
    assert not refused(1, 8, 6144, monkeypatch)
    assert refused(1, 8, 6152, monkeypatch)
    assert refused(8, 256, 6144, monkeypatch)
    assert refused(1, *FLASH, monkeypatch, torch.float32)
    assert [route.cluster_size(1, 8), route.cluster_size(8, 40), route.cluster_size(1, 250)] == [2, 8, 16]


@pytest.mark.gpu
def test_a_token_has_its_own_bits_on_a_gpu() -> None:
    """In one launch or in two, alone and among others."""
    x, *rest = placed(drawn(20, *FLASH), torch.device("cuda"))
    whole = run("fused", x, *rest)
    for tokens in range(1, 9):
        for start in (0, 20 - tokens):
            found = run("cluster", x[start : start + tokens], *rest)
            for one, all_ in zip(found, whole, strict=True):
                assert torch.equal(one, all_[start : start + tokens])
