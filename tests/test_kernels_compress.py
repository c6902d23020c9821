"""Compressors' kernels over several steps: however a sequence is cut, written, taken back and joined with others.

Here the ring is what one step leaves to the next. The single step is judged by the cases of `dsv4 check compress`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4 import kernels
from dsv4.kernels import compress
from dsv4.ops.compress import Ring, StepTokens, compress_kv
from dsv4.ops.rope import Rotation, frequencies, rotation
from dsv4.quant.kv_rows import KvRow
from tests import shim
from tests.devices import normal
from tests.shim.everyday import problems

WHERE = pytest.mark.parametrize("device", ["shim", pytest.param("cuda", marks=pytest.mark.gpu)])
PAGE = 64
STEPS = frequencies(64, 160000.0, 16.0, 65536)


class Cache:
    """Rings and pages of a few sequences, which a fused op writes step by step."""

    def __init__(self, ratio: int, device: str, length: int | None = None) -> None:
        self.ratio, self.device = ratio, "cpu" if device == "shim" else device
        span = 2 * ratio if ratio == 4 else ratio
        width = 1024 if ratio == 4 else 512
        length = length or span + 8
        self.ring = Ring(torch.full((3 * length, 2, width), float("nan"), device=self.device), length)
        size = KvRow(512, 64).page_bytes(PAGE)
        self.pages = torch.zeros(3, size, dtype=torch.uint8, device=self.device)
        self.ape = normal("ape", ratio, 2, width).to(self.device)
        self.ape[:, 0] = 0
        self.norm = normal("norm", 512).to(self.device)

    def step(self, projected: Tensor, places: Sequence[tuple[int, int]]) -> None:
        """projected: [T, 2 * C]; places: slot and position of each token. A sequence has a page of its own."""
        slots, positions = torch.tensor(places, device=self.device).unbind(1)
        turn = rotation(positions // self.ratio * self.ratio, STEPS.to(self.device))
        tokens = StepTokens(slots.contiguous(), positions.contiguous(), slots * PAGE + positions // self.ratio)
        most = max(sum(slot == one for slot, _ in places) for one in range(3))
        self.run(projected.to(self.device), turn, tokens, most)

    def run(self, projected: Tensor, turn: Rotation, tokens: StepTokens, most: int) -> None:
        given = (projected, self.ape, self.norm, 1e-6, turn, tokens, self.ring, most, self.pages)
        with shim.machine() if self.device == "cpu" else nullcontext():
            compress_kv.implementations["fused"].run(*given)

    def same(self, other: Cache) -> bool:
        return torch.equal(self.pages, other.pages)


@pytest.fixture(autouse=True)
def _installed() -> None:
    kernels.install()


def terms(ratio: int, tokens: int, name: str = "terms") -> Tensor:
    return normal(name, tokens, 2048 if ratio == 4 else 1024, size=2)


def straight(slot: int, start: int, stop: int) -> list[tuple[int, int]]:
    return [(slot, position) for position in range(start, stop)]


def whole(ratio: int, device: str, x: Tensor, slot: int = 1) -> Cache:
    cache = Cache(ratio, device)
    cache.step(x, straight(slot, 0, len(x)))
    assert cache.pages.any()
    return cache


def cuts(ratio: int) -> Iterator[object]:
    """Every offset in a block; of long ones but a few, except in the slow tests."""
    for cut in range(2 * ratio + 3):
        slow = ratio > 4 and cut not in (1, 7, ratio - 1, ratio, ratio + 1, 2 * ratio + 2)
        yield pytest.param(ratio, cut, marks=[pytest.mark.slow] * slow, id=f"{ratio} at {cut}")


@WHERE
@pytest.mark.parametrize(("ratio", "cut"), [*cuts(4), *cuts(128)])
def test_a_chunk_may_be_cut_anywhere(ratio: int, cut: int, device: str) -> None:
    x = terms(ratio, 2 * ratio + 3)
    cache = Cache(ratio, device)
    for start, stop in ((0, cut), (cut, len(x))):
        if start < stop:
            cache.step(x[start:stop], straight(1, start, stop))
    assert cache.same(whole(ratio, device, x))


@WHERE
def test_tokens_one_by_one_make_the_same_rows(device: str) -> None:
    x = terms(4, 27)
    cache = Cache(4, device)
    for position in range(len(x)):
        cache.step(x[position : position + 1], [(1, position)])
    assert cache.same(whole(4, device, x))


@WHERE
@pytest.mark.parametrize("ratio", [4, 128])
def test_drafts_that_are_taken_back_leave_nothing(ratio: int, device: str) -> None:
    """Steps of eight tokens of which three stay; the others come again with other numbers."""
    x, other = terms(ratio, 2 * ratio + 8), terms(ratio, 8, "draft")
    cache, start = Cache(ratio, device, (8 if ratio == 4 else 128) + 9), max(0, 2 * ratio - 20)
    cache.step(x[:start], straight(2, 0, start)) if start else None
    while start < 2 * ratio:
        cache.step(torch.cat((x[start : start + 3], other[3:])), straight(2, start, start + 8))
        start += 3
    for position in range(start, 2 * ratio + 8):
        cache.step(x[position : position + 1], [(2, position)])
    count = len(x) // ratio
    layout = KvRow(512, 64)
    wanted = whole(ratio, device, x, 2)
    for row in range(2 * PAGE, 2 * PAGE + count):
        for found, right in zip(row_bytes(layout, cache.pages, row), row_bytes(layout, wanted.pages, row), strict=True):
            assert torch.equal(found, right)


def row_bytes(layout: KvRow, pages: Tensor, row: int) -> tuple[Tensor, Tensor]:
    page, first, scales = (int(at) for at in layout.spans(pages, torch.tensor(row)))
    return pages[page, first:][: layout.row_bytes], pages[page, scales:][: layout.scale_bytes]


@WHERE
@pytest.mark.parametrize("ratio", [4, 128])
def test_sequences_in_one_step_are_as_they_are_alone(ratio: int, device: str) -> None:
    parts = [terms(ratio, count, f"of {count}") for count in (ratio, 2 * ratio + 1, ratio + 2)]
    together, alone = Cache(ratio, device), Cache(ratio, device)
    for start in range(0, 2 * ratio + 1, ratio // 2 + 1):  # pieces of all three
        pieces = [(slot, start, min(start + ratio // 2 + 1, len(x))) for slot, x in enumerate(parts) if start < len(x)]
        places = [place for slot, first, last in pieces for place in straight(slot, first, last)]
        together.step(torch.cat([parts[slot][first:last] for slot, first, last in pieces]), places)
    for slot, x in enumerate(parts):
        alone.step(x, straight(slot, 0, len(x)))
    assert together.same(alone)


@WHERE
@pytest.mark.parametrize("ratio", [4, 128])
def test_one_launch_and_two_leave_the_same(ratio: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens take two, and blocks of threads that have several tokens each."""
    x = terms(ratio, 2 * ratio + 5)
    few = whole(ratio, device, x)
    monkeypatch.setattr(compress, "FEW", 0)
    many = whole(ratio, device, x)
    assert few.same(many)
    assert torch.equal(few.ring.terms.nan_to_num(), many.ring.terms.nan_to_num())


@pytest.mark.parametrize("label", ["ending of 4, 64", "drafts across ends of 128", "odd numbers of 128"])
def test_a_case_as_of_many_tokens(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks end within a block of threads: the first warp stores one while the others pool the next."""
    monkeypatch.setattr(compress, "FEW", 0)
    assert problems(f"compress_kv: {label}") == []


def test_the_ring_is_written_by_the_same_launch_where_it_is_long_enough() -> None:
    x = terms(4, 8)
    for length, names in ((8 + 7, ["compress_kv_4"]), (8 + 6, ["compress_kv_4", "compress_keep"])):
        cache = Cache(4, "shim", length)
        with shim.machine(idle=True) as ran:
            patch = cache.ring, cache.pages
            positions = torch.arange(8)
            turn = rotation(positions, STEPS)
            tokens = StepTokens(torch.zeros_like(positions), positions, positions)
            given = (x, cache.ape, cache.norm, 1e-6, turn, tokens, patch[0], 8, patch[1])
            compress_kv.implementations["fused"].run(*given)
        assert ran == names


@pytest.mark.parametrize("ratio", [4, 128])
def test_the_order_of_blocks_of_threads_is_nothing(ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token first: it reads what it needs of this step from where the product left it."""
    x, start = terms(ratio, ratio + 6), ratio - 2
    ascending, launch = Cache(ratio, "shim"), shim.launch
    descending = Cache(ratio, "shim")

    def backwards(source: str, name: str, grid: int, *args: Any, **how: Any) -> None:
        for block in reversed(range(grid)):
            launch(source, name, grid, *args, blocks=(block, block + 1), **how)

    for cache in (ascending, descending):
        cache.step(x[:start], straight(1, 0, start))
        if cache is descending:
            monkeypatch.setattr(shim, "launch", backwards)
        cache.step(x[start:], straight(1, start, len(x)))
    assert ascending.same(descending)
    assert torch.equal(ascending.ring.terms.nan_to_num(), descending.ring.terms.nan_to_num())


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [4, 128])
def test_a_graph_of_one_step_writes_any_step(ratio: int) -> None:
    """Captured with one set of places and replayed with others, that end blocks and do not."""
    x = terms(ratio, 2 * ratio + 3).cuda()
    cache = Cache(ratio, "cuda")
    projected = x[:1].clone()
    turn = rotation(torch.zeros(1, dtype=torch.int64, device="cuda"), STEPS.cuda())
    tokens = StepTokens(*(torch.full((1,), -1, device="cuda") for _ in range(3)))
    cache.run(projected, turn, tokens, 1)  # loads the kernel, and writes nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.run(projected, turn, tokens, 1)
    for position in range(len(x)):
        now = rotation(torch.tensor([position // ratio * ratio], device="cuda"), STEPS.cuda())
        projected.copy_(x[position : position + 1])
        turn.cos.copy_(now.cos)
        turn.sin.copy_(now.sin)
        for part, value in zip(tokens, (1, position, PAGE + position // ratio), strict=True):
            part.fill_(value)
        graph.replay()
    assert cache.same(whole(ratio, "cuda", x))
