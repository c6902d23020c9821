"""The routed experts' kernels on this CPU, with barriers, copies and tensor cores played as the PTX manual has them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dsv4 import kernels
from dsv4.check.cases import experts as listed
from dsv4.check.contract import Case, judge, placed
from dsv4.kernels import experts
from dsv4.ops.moe import Route
from dsv4.quant.tensor import QTensor
from tests import shim
from tests.shim.build import on_hopper

kernels.install()
CASES = {case.name: case for case in listed.cases() if case.size in ("small", "full") and not case.refusable}
QUICK = ("0 tokens", "1 tokens", "3 tokens", "9 tokens", "odd scales", "scales far apart", "two experts cancel")


@pytest.fixture
def played() -> Path:
    return on_hopper()


def wrong(case: Case, csrc: Path, order: int) -> list[str]:
    with shim.machine(order=order, csrc=csrc):
        found = judge(case, case.op.implementations["fused"].run)
    return [f"{v.check} {v.leaf} {v.distance}" for v in found if not v.ok]


@pytest.mark.parametrize("name", QUICK)
def test_a_case(name: str, played: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, the same bits again, a token alone, reference and oracle."""
    monkeypatch.setattr(experts, "multiprocessors", lambda device: 2)
    assert wrong(CASES[name], played, 0) == []


@pytest.mark.slow
@pytest.mark.parametrize("order", shim.ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_every_order(name: str, order: int, played: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "multiprocessors", lambda device: 5)
    assert wrong(CASES[name], played, order) == []


BUGS = {
    "a sign of the wrong column": ("experts.cu", "(word << 4 & 0x80808080u)", "(word & 0x80808080u)", "1 tokens"),
    "a step of the wrong columns": ("experts.cu", "word.y >> 4 * lane.t", "word.y >> 4 * (3 - lane.t)", "1 tokens"),
    "a scale of the wrong row": ("experts.cu", "64 * lane.warp + 8 * lane.g", "64 * lane.warp", "1 tokens"),
    "32 columns too many": ("experts.cu", "lane.t == pass ?", "lane.t >= pass ?", "scales far apart"),
    "a ring that is not waited for": ("experts.cu", "if (round) empty", "if (0) empty", "9 tokens"),
    "a stage given back too early": ("experts.cu", "if (++pass <= last) continue;", "pass++;", "scales far apart"),
    "no route weight": ("experts.cu", "* (i ? w.y : w.x)", "", "1 tokens"),
    "hidden bytes not dealt out": ("experts.cu", "p ^ (token & 7)", "p", "9 tokens"),
    "token bytes not dealt out": ("expert_tokens.cu", "piece ^ (n & 7)", "piece", "9 tokens"),
    "groups of one expert too few": ("expert_tokens.cu", "(count[e] + wide - 1) / wide", "count[e] / wide", "9 tokens"),
    "choices summed as they came": ("expert_tokens.cu", "+= other < expert", "+= s < slot", "two experts cancel"),
    "the shared expert first": ("expert_tokens.cu", "e ? sum[i] + v[i] : v[i]", "v[i]", "1 tokens"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "multiprocessors", lambda device: 2)
    file, right, planted, name = BUGS[bug]
    csrc = tmp_path / "csrc"
    shutil.copytree(played, csrc)
    text = (csrc / file).read_text()
    assert right in text
    (csrc / file).write_text(text.replace(right, planted))
    with suppress(shim.Fault):
        assert wrong(CASES[name], csrc, 0) != []


@pytest.mark.parametrize(("tokens", "size"), [(1, 8), (64, 8), (170, 8), (171, 16), (400, 32), (8192, 32)])
def test_groups_have_room_for_twice_the_average(tokens: int, size: int) -> None:
    assert experts.wide(tokens, 6, 256) == size


@pytest.mark.parametrize("size", experts.WIDE)
def test_two_blocks_of_few_tokens_fit_a_multiprocessor(size: int) -> None:
    stages, smem = experts.memory(size)
    assert 4 <= stages <= 12
    static = 1024 + size * 192
    whole = smem + static + 1024
    assert whole <= 227 << 10
    assert size > 8 or 2 * whole <= 228 << 10


def test_there_is_room_for_every_way_to_choose() -> None:
    """One expert takes what it can and the others one each, or all are alike."""
    for pairs in (1, 6, 300, 5000):
        for counts in ([pairs], [1] * min(pairs, 256), [max(1, pairs - 255)] + [1] * min(pairs - 1, 255)):
            assert sum(-(-n // 8) for n in counts) <= experts.most_groups(pairs, 256, 8)


@pytest.mark.gpu
def test_a_row_has_its_own_bits_on_a_gpu() -> None:
    """Groups of every width, in company and alone: a slice of Flash, where 6 of 256 experts are chosen."""
    x, picks, stored, beside, limit = placed(listed.given(700, listed.SLICE, 4), torch.device("cuda"))
    run = listed.routed_experts.implementations["fused"].run
    sizes, whole = set(), run(x, picks, stored, beside, limit)
    for width in (1, 3, 64, 200, 350, 700):
        sizes.add(experts.wide(width, 6, 256))
        for start in (0, 700 - width, (700 - width) // 2):
            rows = slice(start, start + width)
            one = QTensor(x.data[rows], x.scale[rows], x.format)
            chosen = Route(picks.experts[rows], picks.weights[rows])
            assert torch.equal(run(one, chosen, stored, beside[rows], limit), whole[rows])
    assert sizes == set(experts.WIDE)
    assert whole.isfinite().all()
