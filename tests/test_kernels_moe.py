"""The experts' kernels on this CPU, with barriers, copies and tensor cores played as the PTX manual has them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import pytest
import torch

from dsv4 import kernels
from dsv4.check.cases import experts as listed
from dsv4.check.contract import Case, judge, placed
from dsv4.kernels import experts
from dsv4.ops.moe import Route
from dsv4.quant.formats import MXFP4, Format
from dsv4.quant.packed import PACKED
from dsv4.quant.tensor import QTensor
from tests import shim
from tests.shim.build import on_hopper

kernels.install()
CASES = {case.name: case for case in listed.cases() if case.size in ("small", "full") and not case.refusable}
QUICK = (
    "1 tokens",
    "9 tokens",
    *(f"9 tokens of {fmt.name}" for fmt in listed.OTHERS),
    "few tokens, two experts cancel",
)


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
@pytest.mark.parametrize(("name", "order"), list(zip(CASES, cycle(shim.ORDERS), strict=False)))
def test_every_case_in_one_order_or_another(
    name: str, order: int, played: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "multiprocessors", lambda device: 5)
    assert wrong(CASES[name], played, order) == []


WORK, FORMATS, KERNELS, TOKENS = (
    "common/expert_work.cuh",
    "common/expert_formats.cuh",
    "common/experts.cuh",
    "expert_tokens.cu",
)
LIST, ENDS = "common/expert_list.cuh", "common/expert_ends.cuh"
BUGS = {
    "a sign of the wrong column": (FORMATS, "(word << 4 & 0x80808080u)", "(word & 0x80808080u)", "1 tokens"),
    "a step of the wrong columns": (FORMATS, "word.y >> 4 * lane.t", "word.y >> 4 * (3 - lane.t)", "1 tokens"),
    "a scale of the wrong row": (FORMATS, "64 * (lane.warp % 4) + 8 * lane.g", "64 * (lane.warp % 4)", "1 tokens"),
    "32 columns too many": (FORMATS, "lane.t == pass ?", "lane.t >= pass ?", "scales far apart"),
    "16 columns too many": (FORMATS, "NOTHING) * 0x00010001u)", "NOTHING) * 0x00010101u)", "nvfp4 scales far apart"),
    "half of a number": (FORMATS, "REST ? whole - head", "REST ? 0", "9 tokens of nvfp4"),
    "a stage given back too early": (KERNELS, "now, b, pass == end", "now, b, true", "scales far apart"),
    "tokens of another group": (WORK, "of.w - further % of.z * wide", "min(of.w, wide / 2)", "130 tokens"),
    "no route weight": (ENDS, "* (i ? w.y : w.x)", "", "1 tokens"),
    "the shared expert for all": (KERNELS, "rows.shared ? m.shared.tiles", "1 ? m.shared.tiles", "9 tokens of fp8"),
    "64 tokens of a group alone": (KERNELS, "task.tokens <= F::NT / 2", "true", "one expert has all tokens"),
    "words of the tile before": (KERNELS, "product.add(sum, other,", "product.add(sum, one,", "64 tokens"),
    "half of the columns quantised alone": (ENDS, "[number * F::WARPS + lane.warp] = top", "[lane.warp] = top",
                                            "64 tokens"),
    "token bytes not dealt out": (TOKENS, "piece ^ (n & 7)", "piece", "9 tokens"),
    "groups of one expert too few": (TOKENS, "(count[e] + wide - 1) / wide", "count[e] / wide", "9 tokens"),
    "choices summed as they came": (TOKENS, "+= other < expert", "+= s < slot", "two experts cancel"),
    "a token's choices in one group": (LIST, "again += other == expert", "again += 0 * other", "few tokens, one twice"),
    "choices of few summed as they came": (LIST, "smaller += other < expert", "smaller += s < slot",
                                           "few tokens, two experts cancel"),
    "whoever comes first sums": (ENDS, "== list.total - 1", "== 0", "3 tokens"),
    "the first expert left out": (TOKENS, "e ? sum[i] + v[i] : v[i]", "v[i]", "9 tokens"),
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


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 8), (64, 8), (170, 8), (171, 16), (400, 32), (682, 32), (683, 128), (8192, 128)]
)
def test_groups_have_room_for_twice_the_average(tokens: int, size: int) -> None:
    assert experts.choose(tokens, 6, 256).wide == size


@pytest.mark.parametrize("fmt", PACKED)
@pytest.mark.parametrize("form", [*experts.FORMS, experts._UP_FEW, experts._DOWN_FEW])
def test_the_ring_fits_a_multiprocessor(form: experts.Form, fmt: Format) -> None:
    for columns in (0, listed.PRO[0]) if form is experts._UP_FEW else (0,):
        stages, smem = experts.memory(form, fmt, columns // 128)
        assert 4 <= stages <= 12
        assert form.beside * (smem + 3072 + form.wide * 192) <= 228 << 10


@pytest.mark.parametrize(
    ("tokens", "k", "d", "whether"),
    [(0, 6, 4096, False), (1, 6, 4096, True), (8, 8, 7168, True), (9, 6, 4096, False), (1, 9, 4096, False),
     (1, 6, 16384, True), (1, 6, 32768, False)],
)  # fmt: skip
def test_when_two_kernels_do_all(tokens: int, k: int, d: int, whether: bool) -> None:
    assert experts.few(tokens, k, d) == whether


def test_there_is_room_for_every_way_to_choose() -> None:
    """One expert takes what it can and the others one each, or all are alike; and the shared one has all tokens."""
    for tokens in (1, 6, 300, 5000):
        pairs = 6 * tokens
        for counts in ([tokens] * 6, [1] * min(pairs, 256), [max(1, pairs - 255)] + [1] * min(pairs - 1, 255)):
            assert sum(-(-n // 8) for n in (*counts, tokens)) <= experts.most_groups(tokens, 6, 256, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [MXFP4, *listed.OTHERS])
def test_a_row_has_its_own_bits_on_a_gpu(fmt: Format) -> None:
    """Groups of every width, in company and alone: a slice of Flash, where 6 of 256 experts are chosen."""
    x, picks, *rest = placed(listed.given(700, listed.SLICE, 4, fmt), torch.device("cuda"))
    run = listed.stored_moe.implementations["fused"].run
    sizes, whole = set(), run(x, picks, *rest)
    for width in (1, 3, 8, 64, 200, 350, 700):
        sizes.add(None if experts.few(width, 6, 4096) else experts.choose(width, 6, 256))
        for start in (0, 700 - width, (700 - width) // 2):
            rows = slice(start, start + width)
            one = QTensor(x.data[rows], x.scale[rows], x.format)
            chosen = Route(picks.experts[rows], picks.weights[rows])
            assert torch.equal(run(one, chosen, *rest), whole[rows])
    assert sizes == {None, *experts.FORMS}
    assert whole.isfinite().all()
