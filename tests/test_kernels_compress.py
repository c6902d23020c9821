"""Compressors' kernels over several steps: however a sequence is cut, written, taken back and joined with others.

Here the ring is what one step leaves to the next. The single step is judged by the cases of `dsv4 check compress`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsv4 import kernels
from dsv4.kernels import compress
from dsv4.ops.compress import Ring, StepTokens, compress_keys, compress_kv
from dsv4.ops.rope import Rotation, frequencies, rotation
from dsv4.quant.index_keys import FP4_KEYS, FP8_KEYS, SCALE_BYTES, KeyLayout
from dsv4.quant.kv_rows import KvRow
from tests import shim
from tests.devices import normal
from tests.shim.everyday import problems

PAGE = 64
STEPS = frequencies(64, 160000.0, 16.0, 65536)


class Kind(NamedTuple):
    """Of a compressor. dims: of an entry."""

    ratio: int
    dims: int
    layout: KvRow | KeyLayout

    @property
    def width(self) -> int:
        return self.dims * (2 if self.ratio == 4 else 1)

    @property
    def span(self) -> int:
        return 2 * self.ratio if self.ratio == 4 else self.ratio

    def terms(self, tokens: int, name: str = "terms") -> Tensor:
        return normal(name, tokens, 2 * self.width, size=2)


FOUR, LONG = Kind(4, 512, KvRow(512, 64)), Kind(128, 512, KvRow(512, 64))
KINDS = {"4": FOUR, "128": LONG, "fp4": Kind(4, 128, FP4_KEYS), "fp8": Kind(4, 128, FP8_KEYS)}
EACH = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
WHERE = pytest.mark.parametrize("device", ["shim", pytest.param("cuda", marks=pytest.mark.gpu)])


class Cache:
    """Rings and pages of three sequences, which a fused op writes step by step."""

    def __init__(self, kind: Kind, device: str, length: int | None = None) -> None:
        self.kind, self.device, length = kind, "cpu" if device == "shim" else device, length or kind.span + 8
        self.ring = Ring(torch.full((3 * length, 2, kind.width), float("nan"), device=self.device), length)
        self.pages = torch.zeros(3, kind.layout.page_bytes(PAGE), dtype=torch.uint8, device=self.device)
        self.ape = normal("ape", kind.ratio, 2, kind.width).to(self.device)
        self.ape[:, 0] = 0
        self.norm = normal("norm", kind.dims).to(self.device)

    def step(self, projected: Tensor, places: Sequence[tuple[int, int]]) -> None:
        """projected: [T, 2 * C]; places: slot and position of each token. A sequence has a page of its own."""
        slots, positions = torch.tensor(places, device=self.device).unbind(1)
        blocks = positions // self.kind.ratio
        turn = rotation(blocks * self.kind.ratio, STEPS.to(self.device))
        tokens = StepTokens(slots.contiguous(), positions.contiguous(), slots * PAGE + blocks)
        most = max(sum(slot == one for slot, _ in places) for one in range(3))
        self.run(projected.to(self.device), turn, tokens, most)

    def run(self, projected: Tensor, turn: Rotation, tokens: StepTokens, most: int) -> None:
        given: Any = (projected, self.ape, self.norm, 1e-6, turn, tokens, self.ring, most, self.pages)
        with shim.machine() if self.device == "cpu" else nullcontext():
            if isinstance(self.kind.layout, KvRow):
                compress_kv.implementations["fused"].run(*given)
            else:
                compress_keys.implementations["fused"].run(*given, self.kind.layout)

    def rows(self, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """The bytes of the first entries of a sequence."""
        layout, page = self.kind.layout, self.pages[slot]
        row = layout.row_bytes if isinstance(layout, KvRow) else layout.data_bytes
        scale = layout.scale_bytes if isinstance(layout, KvRow) else SCALE_BYTES
        return page[: count * row], page[PAGE * row :][: count * scale]

    def same(self, other: Cache) -> bool:
        return torch.equal(self.pages, other.pages)

    def same_ring(self, other: Cache) -> bool:
        return torch.equal(self.ring.terms.nan_to_num(), other.ring.terms.nan_to_num())


@pytest.fixture(autouse=True)
def _installed() -> None:
    kernels.install()


def straight(slot: int, start: int, stop: int) -> list[tuple[int, int]]:
    return [(slot, position) for position in range(start, stop)]


def whole(kind: Kind, device: str, x: Tensor, slot: int = 1) -> Cache:
    cache = Cache(kind, device)
    cache.step(x, straight(slot, 0, len(x)))
    assert cache.pages.any()
    return cache


@functools.cache
def uncut(kind: Kind, device: str) -> Cache:
    """What two blocks and three tokens come to in one step."""
    return whole(kind, device, kind.terms(2 * kind.ratio + 3))


def cuts() -> Iterator[object]:
    """Every offset in a block; of long ones but a few, except in the slow tests."""
    for name, kind in KINDS.items():
        for cut in range(2 * kind.ratio + 3):
            ratio = kind.ratio
            slow = ratio > 4 and cut not in (1, 7, ratio - 1, ratio, ratio + 1, 2 * ratio + 2)
            yield pytest.param(kind, cut, marks=[pytest.mark.slow] * slow, id=f"{name} at {cut}")


@WHERE
@pytest.mark.parametrize(("kind", "cut"), list(cuts()))
def test_a_chunk_may_be_cut_anywhere(kind: Kind, cut: int, device: str) -> None:
    x = kind.terms(2 * kind.ratio + 3)
    cache = Cache(kind, device)
    for start, stop in ((0, cut), (cut, len(x))):
        if start < stop:
            cache.step(x[start:stop], straight(1, start, stop))
    assert cache.same(uncut(kind, device))


@WHERE
@pytest.mark.parametrize("name", ["4", "fp4"])
def test_tokens_one_by_one_make_the_same_rows(name: str, device: str) -> None:
    x = KINDS[name].terms(27)
    cache = Cache(KINDS[name], device)
    for position in range(len(x)):
        cache.step(x[position : position + 1], [(1, position)])
    assert cache.same(whole(KINDS[name], device, x))


@WHERE
@EACH
def test_drafts_that_are_taken_back_leave_nothing(kind: Kind, device: str) -> None:
    """Steps of eight tokens of which three stay; the others come again with other numbers."""
    ratio = kind.ratio
    x, other = kind.terms(2 * ratio + 8), kind.terms(8, "draft")
    cache, start = Cache(kind, device, kind.span + 9), max(0, 2 * ratio - 20)
    if start:
        cache.step(x[:start], straight(2, 0, start))
    while start < 2 * ratio:
        cache.step(torch.cat((x[start : start + 3], other[3:])), straight(2, start, start + 8))
        start += 3
    for position in range(start, len(x)):
        cache.step(x[position : position + 1], [(2, position)])
    count, right = len(x) // ratio, whole(kind, device, x, 2)
    for found, wanted in zip(cache.rows(2, count), right.rows(2, count), strict=True):
        assert torch.equal(found, wanted)


@WHERE
@EACH
def test_sequences_in_one_step_are_as_they_are_alone(kind: Kind, device: str) -> None:
    ratio, piece = kind.ratio, kind.ratio // 2 + 1
    parts = [kind.terms(count, f"of {count}") for count in (ratio, 2 * ratio + 1, ratio + 2)]
    together, alone = Cache(kind, device), Cache(kind, device)
    for start in range(0, 2 * ratio + 1, piece):
        pieces = [(slot, start, min(start + piece, len(x))) for slot, x in enumerate(parts) if start < len(x)]
        places = [place for slot, first, last in pieces for place in straight(slot, first, last)]
        together.step(torch.cat([parts[slot][first:last] for slot, first, last in pieces]), places)
    for slot, x in enumerate(parts):
        alone.step(x, straight(slot, 0, len(x)))
    assert together.same(alone)


@WHERE
@EACH
def test_one_launch_and_two_leave_the_same(kind: Kind, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens take two, and blocks of threads that have several tokens each."""
    x = kind.terms(2 * kind.ratio + 5)
    few = whole(kind, device, x)
    monkeypatch.setattr(compress, "FEW", 0)
    many = whole(kind, device, x)
    assert few.same(many)
    assert few.same_ring(many)


@pytest.mark.slow
@pytest.mark.parametrize(
    "label",
    [
        "compress_kv: ending of 4, 64",
        "compress_kv: drafts across ends of 128",
        "compress_kv: odd numbers of 128",
        "compress_keys: ending of 4, fp4, 64",
    ],
)
def test_a_case_as_of_many_tokens(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks end within a block of threads: the first warp stores one while the others pool the next."""
    monkeypatch.setattr(compress, "FEW", 0)
    assert problems(label) == []


def test_the_ring_is_written_by_the_same_launch_where_it_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the step has in tokens: what counts is how many one sequence has."""
    names: list[str] = []
    monkeypatch.setattr(shim, "launch", lambda source, name, *args, **how: names.append(name))
    places = straight(0, 0, 8) + straight(1, 8, 16)
    for length, ran in ((8 + 7, ["compress_kv_4"]), (8 + 6, ["compress_kv_4", "compress_keep"])):
        Cache(FOUR, "shim", length).step(FOUR.terms(16), places)
        assert names == ran
        names.clear()


@EACH
def test_the_order_of_blocks_of_threads_is_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token first: it reads what it needs of this step from where the product left it."""
    x, start = kind.terms(kind.ratio + 6), kind.ratio - 2
    ascending, descending, launch = Cache(kind, "shim"), Cache(kind, "shim"), shim.launch

    def backwards(source: str, name: str, grid: int, *args: Any, **how: Any) -> None:
        for block in reversed(range(grid)):
            launch(source, name, grid, *args, blocks=(block, block + 1), **how)

    for cache in (ascending, descending):
        cache.step(x[:start], straight(1, 0, start))
        if cache is descending:
            monkeypatch.setattr(shim, "launch", backwards)
        cache.step(x[start:], straight(1, start, len(x)))
    assert ascending.same(descending)
    assert ascending.same_ring(descending)


@pytest.mark.gpu
@EACH
def test_a_graph_of_one_step_writes_any_step(kind: Kind) -> None:
    """Captured with one set of places and replayed with others, that end blocks and do not."""
    ratio, steps = kind.ratio, STEPS.cuda()
    x = kind.terms(2 * ratio + 3).cuda()
    cache = Cache(kind, "cuda")
    projected, turn = x[:1].clone(), rotation(torch.zeros(1, dtype=torch.int64, device="cuda"), steps)
    tokens = StepTokens(*(torch.full((1,), -1, device="cuda") for _ in range(3)))
    cache.run(projected, turn, tokens, 1)  # loads the kernel, and writes nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.run(projected, turn, tokens, 1)
    for position in range(len(x)):
        now = rotation(torch.tensor([position // ratio * ratio], device="cuda"), steps)
        projected.copy_(x[position : position + 1])
        turn.cos.copy_(now.cos)
        turn.sin.copy_(now.sin)
        for part, value in zip(tokens, (1, position, PAGE + position // ratio), strict=True):
            part.fill_(value)
        graph.replay()
    assert cache.same(whole(kind, "cuda", x))
