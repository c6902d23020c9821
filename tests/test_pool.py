"""Rows that are decoded once for a step: each token finds the same numbers as where it looks for itself."""

from __future__ import annotations

import random

import pytest
import torch

from dsv4.cache.store import Store
from dsv4.cache.stored import StoredLayer
from dsv4.config import EngineOptions, ModelConfig
from dsv4.llm import EMBEDDED
from dsv4.model.batch import Segment, Steps, make_batch
from dsv4.model.pool import Pool, Run, pays
from dsv4.ops.index import entry_rows
from dsv4.ops.kv import read_kv

CONFIG = ModelConfig.load(EMBEDDED)
OPTIONS = EngineOptions(stored=True, max_sequences=4, max_context=1024, prefill_chunk=300)


@pytest.fixture(scope="module")
def store() -> Store:
    """Every row another one, and pages in no order."""
    made = Store(CONFIG, OPTIONS)
    made.table.copy_(torch.randperm(made.table.numel()).view(made.table.shape))
    for layer in made.layers:
        assert isinstance(layer, StoredLayer)
        for paged in (layer.near, layer.far):
            count = len(paged.pages) * paged.layout.page_rows(paged.pages.shape[1])
            rows = torch.randn(count, CONFIG.head_dim).bfloat16()
            paged[torch.arange(count)] = torch.cat(paged.layout.encode(rows), 1)
    return made


SEGMENTS = {
    "a prompt": [(2, 0, 300)],
    "its second chunk": [(1, 300, 300)],
    "three beside decodes": [(0, 130, 100), (3, 1000, 1), (1, 0, 150), (2, 511, 1)],
    "one token": [(3, 0, 1)],
}


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_each_token_finds_what_it_sees(name: str, ratio: int, store: Store) -> None:
    layer = next(one for one in store.layers if one.layout.ratio == ratio)
    assert isinstance(layer, StoredLayer)
    segments = [Segment(slot, start, [1] * count) for slot, start, count in SEGMENTS[name]]
    batch = make_batch(segments, CONFIG.layer_ratios, Steps.of(CONFIG, "cpu", stored=True))
    places, widths = batch.places(layer), (CONFIG.head_dim, CONFIG.qk_rope_head_dim)
    pool = Pool(batch.runs, layer.layout, layer.table, batch.slots, batch.positions)
    near, far = pool.decoded(layer, *widths)
    assert_same(near, pool.seen, layer.near.pages, places.window)
    assert len(near) == sum(min(128 + count - 1, start + count) for _, start, count in SEGMENTS[name])
    if not ratio:
        assert not len(far)
        return
    every = places.blocks(places.most).rows
    assert_same(far, pool.first_rows(places.most), layer.far.pages, every)
    picked = torch.where(torch.rand(places.every.shape) < 0.3, places.every, -1)
    found = entry_rows(picked, pool.table, batch.slots, layer.layout.entries)
    assert_same(far, found, layer.far.pages, entry_rows(picked, layer.table, batch.slots, layer.layout.entries))


def assert_same(rows: torch.Tensor, listed: torch.Tensor, pages: torch.Tensor, stored: torch.Tensor) -> None:
    assert torch.equal(listed < 0, stored < 0)
    there = listed >= 0
    wanted = read_kv(pages, stored[there], CONFIG.head_dim, CONFIG.qk_rope_head_dim)
    assert torch.equal(rows[listed[there]], wanted)


def test_a_pool_pays_for_prompts_alone(store: Store) -> None:
    csa, hca = (next(one.layout for one in store.layers if one.layout.ratio == ratio) for ratio in (4, 128))
    assert pays([Run(0, 0, 300)], csa, 75)
    assert pays([Run(0, 0, 300)], hca, 2)
    assert not pays([Run(0, 900, 901)], csa, 64)
    assert not pays([Run(slot, 900, 901) for slot in range(4)], csa, 64)
    assert not pays([Run(0, 1_000_000, 1_000_200)], csa, 512)
    assert pays([Run(0, 1_000_000, 1_008_192)], csa, 512)
    assert not pays([], csa, 64)


def test_random_runs_share_no_row(store: Store) -> None:
    """Of the pool: one that two tokens see is one row of the cache."""
    draw = random.Random(5)
    layer = next(one for one in store.layers if one.layout.ratio == 4)
    assert isinstance(layer, StoredLayer)
    for _ in range(10):
        segments = [
            Segment(slot, draw.randint(0, 700), [1] * draw.randint(1, 200)) for slot in draw.sample(range(4), 3)
        ]
        batch = make_batch(segments, CONFIG.layer_ratios, Steps.of(CONFIG, "cpu", stored=True))
        pool = Pool(batch.runs, layer.layout, layer.table, batch.slots, batch.positions)
        pairs = {*zip(pool.seen.flatten().tolist(), batch.places(layer).window.flatten().tolist(), strict=True)} - {
            (-1, -1)
        }
        assert len({mine for mine, _ in pairs}) == len({own for _, own in pairs}) == len(pairs)
