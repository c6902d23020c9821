"""The cache's layout and bytes, and the bookkeeping of what can be taken back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4.cache.layout import cache_bytes, cache_parts, layouts, page_count, page_tokens, reach
from dsv4.cache.store import LayerStore, Store
from dsv4.cache.stored import StoredLayer
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import RequestError
from tests.micro import micro_config

NAMES = ["tiny-pro", "tiny-flash-0731", "flash", "pro-0813"]


def options(**asked: Any) -> EngineOptions:
    return EngineOptions(**({"max_context": 256, "prefill_chunk": 64} | asked))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_the_counted_bytes_are_those_of_the_tensors(name: str, dtype: str) -> None:
    config, asked = ModelConfig.named(name), options(dtype=dtype, max_sequences=3, reuse_points=2, cache_tokens=300)
    tensors = [t for layer in Store(config, asked, points=2).layers for t in layer.tensors()]
    assert cache_bytes(config, asked) == sum(t.nbytes for t in tensors)
    assert {t.dtype for t in tensors} == {getattr(torch, dtype), torch.float32}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", ["tiny-pro", "flash"])
def test_each_part_of_a_cache_is_counted(name: str, stored: bool) -> None:
    """Rings, pages and what is kept; where a layer's rings and pages are one tensor, by its rows."""
    config = ModelConfig.named(name)
    asked = options(stored=stored, max_sequences=3, reuse_points=2, cache_tokens=300)
    found = [0, 0, 0]
    for layer in Store(config, asked, points=2).layers:
        sizes = [tensor.nbytes for tensor in layer.tensors()]
        if isinstance(layer, StoredLayer):
            pages = [one.pages.nbytes for one in (layer.far, layer.keys) if one and one is not layer.near]
            kept = sizes[-5:]
        else:
            assert isinstance(layer, LayerStore)
            row = layer.kv[0].nbytes
            pages, kept = [layer.keys.nbytes, row * layer.layout.pages * layer.layout.entries], sizes[4:]
        found[1] += sum(pages)
        found[2] += sum(kept)
        found[0] += sum(sizes) - sum(pages) - sum(kept)
    assert list(cache_parts(config, asked)) == found


def test_bytes_of_one_sequence_of_flash_by_hand() -> None:
    """Window 128 + chunk 64; rows of 512 BF16; keys of 128; compressor rings of 8 + 64 and 128 + 64 FP32 rows.

    The draft's window has 8 rows more. A state: a window, a page of 32 entries and keys or of one entry, 8 or 128 rows.
    """
    config = ModelConfig.named("flash")
    ratios = [*config.layer_ratios, 0]
    window, row = 192 * 512 * 2, 512 * 2
    four = window + 64 * (512 + 128) * 2 + 72 * 2 * (1024 + 256) * 4
    plain = window + 2 * row + 192 * 2 * 512 * 4
    wanted = sum({0: window, 4: four, 128: plain}[ratio] for ratio in ratios) + 8 * row
    assert cache_bytes(config, options(reuse_points=0)) == wanted
    assert (ratios.count(0), ratios.count(4), ratios.count(128)) == (3, 21, 20)
    four, plain = 32 * (512 + 128) * 2 + 8 * 2 * (1024 + 256) * 4, row + 128 * 2 * 512 * 4
    state = 44 * 128 * row + 21 * four + 20 * plain
    assert cache_bytes(config, options(reuse_points=3)) == wanted + 3 * state


@pytest.mark.parametrize(("context", "asked", "pages"), [(256, None, 6), (257, None, 9), (256, 256, 2), (256, 300, 3)])
def test_pages_are_enough_for_what_was_asked(context: int, asked: int | None, pages: int) -> None:
    made = options(max_sequences=3, max_context=context, cache_tokens=asked)
    assert page_count(ModelConfig.named("tiny-pro"), made) == pages


def test_a_page_holds_whole_entries_of_every_layer() -> None:
    assert page_tokens(ModelConfig.named("flash")) == 128
    assert page_tokens(micro_config(compress_ratios=[6, 4, 0])) == 384


def test_there_is_a_layout_for_every_layer_and_a_window_for_every_draft() -> None:
    config = ModelConfig.named("tiny-flash-0731")
    found = layouts(config, options())
    assert [one.ratio for one in found] == [*config.layer_ratios, 0, 0, 0]
    assert [one.indexed for one in found] == [one.ratio == 4 for one in found]
    assert all(one.pages * one.entries == (256 // one.ratio if one.ratio else 0) for one in found)


@pytest.mark.parametrize(
    ("chunk", "slack", "context", "wanted"), [(64, 8, 256, 64), (4, 8, 256, 9), (512, 8, 256, 256), (1, 0, 256, 1)]
)
def test_reach_is_a_chunk_or_a_token_with_its_draft(chunk: int, slack: int, context: int, wanted: int) -> None:
    asked = options(prefill_chunk=chunk, draft_slack=slack, max_context=context)
    assert reach(asked) == Store(ModelConfig.named("tiny-pro"), asked).reach == wanted


@given(st.integers(1, 40), st.integers(0, 12), st.integers(1, 400))
def test_rings_hold_a_window_and_what_may_be_taken_back(chunk: int, slack: int, context: int) -> None:
    """A step of `reach` tokens overwrites nothing that its first token, or a return to before it, still reads."""
    asked = options(prefill_chunk=chunk, draft_slack=slack, max_context=context)
    for one in layouts(ModelConfig.named("tiny-pro"), asked):
        assert one.window >= 128 + reach(asked) - 1
        span = {0: 0, 4: 8, 128: 128}[one.ratio]
        assert one.tail >= (span + reach(asked) - 1 if one.ratio else 0)


def test_no_two_things_share_a_row() -> None:
    """Window positions of one ring's length, of all slots, and entries of all pages."""
    asked = options(max_sequences=3, cache_tokens=512)
    for one in layouts(ModelConfig.named("tiny-pro"), asked):
        slots, pages, entries = torch.arange(3).unsqueeze(1), torch.arange(4).unsqueeze(1), torch.arange(one.entries)
        rows = one.window_rows(slots, torch.arange(1000, 1000 + one.window)).flatten().tolist()
        if one.ratio:
            rows += one.entry_rows(pages, 5 * one.entries + entries).flatten().tolist()
            keys = one.key_rows(pages, 3 * one.entries + entries).flatten().tolist()
            assert sorted(keys) == list(range(4 * one.entries))
            tail = one.tail_rows(slots, torch.arange(77, 77 + one.tail)).flatten().tolist()
            assert sorted(tail) == list(range(3 * one.tail))
        assert sorted(rows) == list(range(one.rows))


# --- how far each sequence has come ----------------------------------------------------------------------------------


@pytest.fixture
def store() -> Store:
    """Two slots, reach 64."""
    return Store(ModelConfig.named("tiny-pro"), options(max_sequences=2))


def test_slots_advance_and_reset_on_their_own(store: Store) -> None:
    store.advance(0, 10)
    store.advance(1, 64)
    store.advance(0, 5)
    assert store.lengths == [15, 64]
    store.reset(0)
    assert store.lengths == [0, 64]
    assert store.mark(1) == 64


def test_more_than_the_rings_or_the_context_hold_is_a_bug(store: Store) -> None:
    with pytest.raises(AssertionError):
        store.advance(0, 65)
    with pytest.raises(AssertionError):
        store.advance(0, -1)
    for _ in range(4):
        store.advance(0, 64)
    with pytest.raises(AssertionError):
        store.advance(0, 1)


def test_a_rewind_of_reach_is_allowed_and_of_one_more_is_not(store: Store) -> None:
    store.advance(0, 64)
    store.advance(0, 36)
    store.rewind(0, 100)
    with pytest.raises(
        RequestError, match=r"^cannot rewind that far; got position 35 of 100; wanted at most 64 tokens"
    ):
        store.rewind(0, 35)
    assert store.mark(0) == 100
    store.rewind(0, 36)
    assert store.mark(0) == 36


def test_repeated_rewinds_count_from_the_furthest_token_written(store: Store) -> None:
    """Rings still hold the tokens that were taken back: two rewinds must not reach further than one."""
    store.advance(0, 64)
    store.advance(0, 36)
    store.rewind(0, 50)
    with pytest.raises(RequestError):
        store.rewind(0, 30)
    store.advance(0, 10)
    with pytest.raises(RequestError):
        store.rewind(0, 35)
    store.rewind(0, 36)
    store.reset(0)
    store.advance(0, 20)
    store.rewind(0, 0)


@pytest.mark.parametrize("mark", [-1, 21])
def test_a_mark_that_was_never_made_is_refused(mark: int, store: Store) -> None:
    store.advance(0, 20)
    with pytest.raises(RequestError, match="cannot rewind"):
        store.rewind(0, mark)


def test_rewinding_one_slot_leaves_the_other(store: Store) -> None:
    store.advance(0, 20)
    store.advance(1, 30)
    store.rewind(0, 3)
    assert store.lengths == [3, 30]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 64)), max_size=40))
def test_whatever_is_allowed_is_still_in_the_rings(moves: list[tuple[bool, int]]) -> None:
    """A model of one ring: after any allowed moves, the window before the mark holds what was last written for it."""
    store = Store(ModelConfig.named("tiny-pro"), options(max_sequences=1))
    rows = store.layers[0].layout.window
    ring: dict[int, tuple[int, int]] = {}
    written: dict[int, int] = {}
    for number, (back, count) in enumerate(moves):
        at = store.mark(0)
        if back:
            if at < count:
                continue
            try:
                store.rewind(0, at - count)
            except RequestError:
                continue
        elif at + count <= store.capacity:
            for position in range(at, at + count):
                ring[position % rows], written[position] = (position, number), number
            store.advance(0, count)
        for position in itertools.islice(range(store.mark(0) - 1, -1, -1), 127):
            assert ring[position % rows] == (position, written[position])
