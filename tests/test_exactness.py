"""Exactness by name. Every "=" is bitwise, in `official` numerics on the CPU.

The models are the embedded one and a synthetic one in the largest model's layer pattern. Compared are the streams
behind the last layer, logits, and what the cache holds.

All caches start as NaN: a number that is read without having been written for this position shows at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.cache import layout
from dsv4.checkpoint.synth import synth
from dsv4.config import ModelConfig
from dsv4.model import batch as model_batch
from dsv4.model.batch import Segment
from dsv4.model.dspark import Draft, DSpark
from dsv4.model.mtp import Mtp
from tests.exact import LENGTHS, OPTIONS, Rig, different_state, same

BORDERS = (4, 64, 128, 256)  # blocks of both ratios, the attention's and the indexer's steps
SMALL = {"prefill_chunk": 32}  # rings that wrap several times in one prompt


@pytest.fixture(scope="session")
def pico(pico_dir: Path) -> Rig:
    """The embedded model and a prompt of 300 tokens, of whose 75 blocks the indexer selects 16."""
    return Rig.open(pico_dir)


@pytest.fixture(scope="session")
def tiny_pro(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """Six synthetic layers in Pro's pattern (128, 128, 4, 128, 4, 128) and a prompt of 140 tokens."""
    directory = tmp_path_factory.mktemp("synth") / "tiny-pro"
    synth(ModelConfig.named("tiny-pro"), directory, seed=1)
    return Rig.open(directory, length=140)


@pytest.fixture(params=["pico", "tiny_pro"])
def rig(request: pytest.FixtureRequest) -> Rig:
    """Each of the two models."""
    found: Rig = request.getfixturevalue(request.param)
    return found


def around(borders: Sequence[int], reach: int, length: int) -> list[int]:
    """Lengths within `reach` of a border, of a prompt of `length`: 1 .. length - 1."""
    near = {border + step for border in (0, *borders, length) for step in range(-reach, reach + 1)}
    return sorted(n for n in near if 0 < n < length)


def check(rig: Rig, streams: Tensor, store: Any, slot: int = 0) -> None:
    """The prompt's last `len(streams)` tokens, and its whole cache, equal those of the run in one piece."""
    end = store.mark(slot)
    assert same(streams, rig.whole[end - len(streams) : end])
    assert same(rig.logits(streams[-1]), rig.whole_logits[end - 1])
    if end == rig.length:
        assert different_state(store, rig.whole_store, len(rig.model.blocks), (slot, 0)) == []


# --- decode = prefill ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(1, 10), (60, 68), (124, 132), (252, 260), (292, 300)])
def test_decode_equals_prefill(start: int, end: int, pico: Rig) -> None:
    """Streams, logits and cache of tokens run one by one = those of one prefill, across every kind of block end."""
    _decode(pico, start, end, **SMALL)


@pytest.mark.parametrize(("start", "end"), [(1, 6), (62, 66), (126, 130), (137, 140)])
def test_decode_equals_prefill_in_pros_pattern(start: int, end: int, tiny_pro: Rig) -> None:
    _decode(tiny_pro, start, end)


@pytest.mark.slow
def test_decode_of_every_token_equals_prefill(rig: Rig) -> None:
    """A prompt that is never prefilled at all: position 0 to the last, in rings that hold a draft and no more."""
    _decode(rig, 1, rig.length, prefill_chunk=1)


def _decode(rig: Rig, start: int, end: int, **options: int) -> None:
    store = rig.store(**options)
    check(rig, rig.pieces(store, [*range(store.reach, start, store.reach), start]), store)
    for token in range(start, end):
        check(rig, rig.pieces(store, [token + 1]), store)


def test_logits_of_one_token_equal_those_among_all(rig: Rig) -> None:
    """The head over 1, 2, 7 or all tokens: a token's row has the same bits."""
    for count in (1, 2, 7):
        assert same(rig.model.logits(rig.whole[-count:]), rig.whole_logits[-count:])


# --- chunked = whole -------------------------------------------------------------------------------------------------


def _cut(rig: Rig, cut: int) -> None:
    store = rig.store()
    streams = rig.pieces(store, [cut, rig.length])
    check(rig, streams, store)


@pytest.mark.parametrize("cut", sorted({*around(BORDERS, 1, 300), *range(17, 300, 83)}))
def test_two_chunks_equal_one(cut: int, pico: Rig) -> None:
    """Streams of all 300 tokens, logits and cache: cut beside every border and between."""
    _cut(pico, cut)


@pytest.mark.parametrize("cut", [1, 4, 66, 127, 129])
def test_two_chunks_equal_one_in_pros_pattern(cut: int, tiny_pro: Rig) -> None:
    _cut(tiny_pro, cut)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_a_cut_at_every_residue_equals_none(part: int, pico: Rig) -> None:
    """The prompt in two, at a border and anywhere between."""
    for cut in LENGTHS[part::8]:
        _cut(pico, cut)


@pytest.mark.parametrize("again", range(2))
def test_random_chunks_in_small_rings_equal_one(again: int, seed: int, rig: Rig) -> None:
    """Chunks of 1 to 32 tokens, in rings of a window and 32: streams, logits and cache."""
    draw, store, ends = random.Random(seed + again), rig.store(**SMALL), [0]
    while ends[-1] < rig.length:
        ends.append(min(ends[-1] + draw.randint(1, 32), rig.length))
    check(rig, rig.pieces(store, ends[1:]), store)


def test_full_chunks_in_small_rings_equal_one(rig: Rig) -> None:
    store = rig.store(**SMALL)
    check(rig, rig.pieces(store, [*range(32, rig.length, 32), rig.length]), store)


# --- batch = alone ---------------------------------------------------------------------------------------------------


def _together(rig: Rig, prompts: list[list[int]], steps: list[list[int]], seed: int) -> None:
    """Each step adds so many tokens to each prompt, in random order; compared with every prompt alone."""
    draw, slots = random.Random(seed), random.Random(seed + 1).sample(range(4), len(prompts))
    store, found = rig.store(), [[] for _ in prompts]  # type: list[list[Tensor]]
    for step in steps:
        order = [n for n, count in enumerate(step) if count]
        draw.shuffle(order)
        parts = [(slots[n], prompts[n][(at := store.mark(slots[n])) : at + step[n]]) for n in order]
        for n, streams in zip(order, rig.run(store, *parts), strict=True):
            found[n].append(streams)
    for n, prompt in enumerate(prompts):
        alone = rig.store()
        (streams,) = rig.run(alone, (0, prompt[: store.mark(slots[n])]))
        assert same(torch.cat(found[n]), streams), f"prompt {n}"
        assert different_state(store, alone, len(rig.model.blocks), (slots[n], 0)) == []


def test_a_batch_of_unequal_prompts_equals_each_alone(rig: Rig, seed: int) -> None:
    """Prompts of 1 to 150 tokens prefilled in one step, in any slots and order."""
    lengths = [150, 1, 67, 5] if rig.length == 300 else [70, 1, 33, 5]
    prompts = [rig.random_ids(length, seed + length) for length in lengths]
    _together(rig, prompts, [lengths], seed)


def test_prefill_and_decode_in_one_step_equal_each_alone(rig: Rig, seed: int) -> None:
    """One prompt decodes while others are prefilled in chunks, join late, and end blocks of 4 and 128 beside it."""
    prompts = [rig.random_ids(140, seed + n) for n in range(4)]
    steps = [[70, 3, 0, 0], [1, 60, 2, 0], [1, 1, 1, 0], [1, 1, 1, 126], [1, 1, 1, 1], [2, 5, 1, 1], [1, 1, 1, 2]]
    _together(rig, prompts, steps, seed)


def test_a_decode_beside_a_much_longer_sequence_equals_it_alone(pico: Rig) -> None:
    """A young sequence sees more (absent) entries in its row lists when its neighbour is long, and no other bit."""
    store = pico.store()
    pico.pieces(store, [296], slot=2)
    pico.pieces(store, [9], slot=1)
    for end in range(10, 14):
        young, old = pico.run(store, (1, pico.ids[end - 1 : end]), (2, pico.ids[286 + end : 287 + end]))
        assert same(young, pico.whole[end - 1 : end])
        assert same(old, pico.whole[286 + end : 287 + end])


# --- rewound = never sampled -----------------------------------------------------------------------------------------


def _rewind_at(rig: Rig, store: Any, wrong: Sequence[int], keep: int = 0, singly: bool = False) -> None:
    """Add `keep` right and then wrong tokens, take the wrong ones back, and go on with one right token."""
    at = store.mark(0)
    ids = [*rig.ids[at : at + keep], *wrong]
    for part in [[i] for i in ids] if singly else [ids]:
        rig.run(store, (0, part))
    store.rewind(0, at + keep)
    check(rig, rig.pieces(store, [at + keep + 1]), store)


@pytest.mark.parametrize("border", [64, 128, 256])
def test_rewound_equals_never_sampled(border: int, pico: Rig, seed: int) -> None:
    """1 to 8 wrong tokens drafted at every residue around a block end, taken back.

    The right token's streams and logits, and those after it, are as if nothing had been there.
    """
    store = pico.store(prefill_chunk=8)
    pico.pieces(store, range(8, border - 4, 8))
    pico.pieces(store, [border - 5])
    for number, at in enumerate(range(border - 5, border + 5)):
        assert store.mark(0) == at
        _rewind_at(pico, store, pico.random_ids(1 + number % 8, seed + at), singly=number % 3 == 0)


def test_partly_accepted_drafts_equal_none(rig: Rig, seed: int) -> None:
    """Eight tokens checked in one step, 0 to 7 of them accepted, again and again across a border of 128."""
    store = rig.store(prefill_chunk=8)
    rig.pieces(store, [*range(8, 104, 8), 101])
    for keep in (0, 7, 1, 6, 2, 5, 3, 4):
        _rewind_at(rig, store, rig.random_ids(8 - keep, seed + keep), keep)


def test_rewinding_as_far_as_the_rings_reach_equals_never_sampled(rig: Rig, seed: int) -> None:
    """32 wrong tokens over a border of 128, in rings of a window and 32, taken back; then to the end in chunks."""
    store, at = rig.store(**SMALL), 99
    rig.pieces(store, [*range(32, at, 32), at])
    _rewind_at(rig, store, rig.random_ids(32, seed))
    check(rig, rig.pieces(store, [*range(at + 33, rig.length, 32), rig.length]), store)


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, 9))
def test_every_rewind_around_every_border_equals_never_sampled(count: int, pico: Rig, seed: int) -> None:
    """Every number of wrong tokens at every residue, in one step or one by one."""
    store = pico.store(prefill_chunk=8)
    for border in (8, 64, 128, 256):
        start = max(border - 9, 1)
        pico.pieces(store, [*range(store.mark(0) + 8, start, 8), start])
        for at in range(start, border + 5):
            _rewind_at(pico, store, pico.random_ids(count, seed + at), singly=(at + count) % 2 == 0)
            store.rewind(0, at)
            pico.pieces(store, [at + 1])


# --- a used slot = a fresh one ---------------------------------------------------------------------------------------


def test_a_slot_after_a_longer_sequence_equals_a_fresh_one(rig: Rig, seed: int) -> None:
    """Streams and cache of new sequences, prefilled and one token on, each where a longer one was."""
    used = rig.store()
    rig.pieces(used, [rig.length])
    for length in (130, 66, 3, 1):
        used.reset(0)
        fresh, ids = rig.store(), rig.random_ids(length + 1, seed)
        for part in (ids[:-1], ids[-1:]):
            assert same(*rig.run(used, (0, part)), *rig.run(fresh, (0, part)))
        assert different_state(used, fresh, len(rig.model.blocks)) == []


def test_two_runs_and_two_threads_equal_one(rig: Rig) -> None:
    """The same step again, and on two threads: same bits. (At these widths; wide sums may split by thread.)"""
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            check(rig, rig.pieces(store := rig.store(), [rig.length]), store)
        finally:
            torch.set_num_threads(before)


# --- drafts ----------------------------------------------------------------------------------------------------------


def test_mtp_in_pieces_equals_mtp_in_one(rig: Rig) -> None:
    """The draft layer's streams and logits for 138 positions: in one step = in chunks of 64 and one by one."""
    draft, whole, pieces = Mtp(rig.config, rig.weights, OPTIONS, rig.model), rig.store(), rig.store()
    expected = _mtp(rig, draft, whole, [138])
    found = _mtp(rig, draft, pieces, [64, 128, *range(129, 139)])
    assert same(found, expected)
    assert same(draft.logits(found[-1:]), draft.logits(expected)[-1:])


def test_mtp_in_a_batch_equals_mtp_alone(rig: Rig) -> None:
    """Two sequences in one step of the draft layer = each in a step of its own."""
    draft, store = Mtp(rig.config, rig.weights, OPTIONS, rig.model), rig.store()
    ends = (50, 33)
    streams = torch.cat([rig.whole[:end] for end in ends])
    ids = torch.tensor([i for end in ends for i in rig.ids[1 : end + 1]])
    batch = rig.model.batch([Segment(slot, 0, rig.ids[:end]) for slot, end in zip((3, 1), ends, strict=True)])
    found = draft(streams, ids, batch, store.layers[-1]).split(ends)
    for end, part in zip(ends, found, strict=True):
        assert same(part, _mtp(rig, draft, rig.store(), [end]))


def _mtp(rig: Rig, draft: Mtp, store: Any, ends: Sequence[int]) -> Tensor:
    """The draft layer over (H_i, id_{i+1}), one step up to each of `ends`."""
    parts, start = [], 0
    for end in ends:
        batch = rig.model.batch([Segment(0, start, rig.ids[start:end])])
        ids = torch.tensor(rig.ids[start + 1 : end + 1])
        parts.append(draft(rig.whole[start:end], ids, batch, store.layers[-1]))
        start = end
    return torch.cat(parts)


def test_the_three_stage_draft_is_the_same_in_pieces_and_beside_others(tmp_path: Path) -> None:
    """Drafted ids, logits, confidences: observed in one step = in chunks = beside another sequence, in another slot."""
    synth(ModelConfig.named("tiny-flash-0731"), tmp_path / "model", seed=1)
    rig = Rig.open(tmp_path / "model", length=140)
    draft = DSpark(rig.config, rig.weights, OPTIONS, rig.model)
    whole = _observed(rig, draft, rig.store(), 0, [140], [])
    assert _equal_drafts(_observed(rig, draft, rig.store(), 0, [3, 64, 129, 140], []), whole)
    assert _equal_drafts(_observed(rig, draft, rig.store(), 2, [70, 140], rig.random_ids(20, 3)), whole)


def _observed(rig: Rig, draft: DSpark, store: Any, slot: int, ends: Sequence[int], other: list[int]) -> Draft:
    """Run the prompt in steps, each beside `other` in slot 1, and draft behind it."""
    stores = store.layers[-3:]
    for end in ends:
        store.reset(1)
        parts = [Segment(1, 0, other)] if other else []
        parts.append(Segment(slot, store.mark(slot), rig.ids[store.mark(slot) : end]))
        batch = rig.model.batch(parts)
        out = rig.model(batch, store)
        assert out.targets is not None
        draft.observe(out.targets, batch, stores)
        store.advance(slot, end - store.mark(slot))
    return draft.draft(slot, rig.length - 1, 7, stores)


def _equal_drafts(left: Draft, right: Draft) -> bool:
    return left.ids == right.ids and same(left.logits, right.logits) and same(left.confidence, right.confidence)


# --- these tests can fail --------------------------------------------------------------------------------------------


def _library_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library product of all rows at once, whose order of summation follows their number."""
    for module in ("ops.linear", "ops.mhc", "ops.moe", "ops.compress", "ops.index", "ops.quantize", "model.model"):
        monkeypatch.setattr(f"dsv4.{module}.matmul", lambda x, weight: F.linear(x.float(), weight.float()))


def _straddling_blocks_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that began in an earlier step are never pooled."""
    real = model_batch._closing
    monkeypatch.setattr(
        model_batch, "_closing", lambda places, *more: real(places[next(_beginning(places, more[0]), 0) :], *more)
    )


def _beginning(places: Sequence[tuple[int, int]], ratio: int) -> Any:
    return (n for n, (_, position) in enumerate(places) if position % ratio == 0)


def _short_rings(name: str, rows: Callable[[layout.LayerLayout], int]) -> Callable[[pytest.MonkeyPatch], None]:
    """A ring of the model's own size, as if nothing were ever taken back."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        real = layout.layouts
        monkeypatch.setattr(
            "dsv4.cache.store.layouts",
            lambda *given: tuple(replace(one, **{name: rows(one)}) for one in real(*given)),
        )

    return plant


def _cutting(rig: Rig) -> None:
    _cut(rig, 66)


def _rewinding(rig: Rig) -> None:
    store = rig.store(**SMALL)
    rig.pieces(store, [32, 64, 96, 128, 129])
    _rewind_at(rig, store, rig.random_ids(32, 0))


@pytest.mark.parametrize(
    ("plant", "test"),
    [
        pytest.param(_library_matmul, _cutting, id="rows summed by their number"),
        pytest.param(_straddling_blocks_lost, _cutting, id="blocks over a chunk's border lost"),
        pytest.param(_short_rings("window", lambda one: 128), _rewinding, id="window ring without slack"),
        pytest.param(_short_rings("tail", lambda one: 2 * one.ratio), _rewinding, id="tail without slack"),
    ],
)
def test_a_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], test: Callable[[Rig], None], pico: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each equality above goes red when its premise is broken."""
    assert pico.whole_logits.isfinite().all()
    assert pico.whole_store.mark(0) == pico.length
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test(pico)
