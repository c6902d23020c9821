"""Sequences in a model whose cache is poisoned, and comparison bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dsv4.cache.store import LayerStore, Store
from dsv4.checkpoint.load import load
from dsv4.checkpoint.reader import Checkpoint
from dsv4.config import EngineOptions, ModelConfig
from dsv4.model.batch import Segment
from dsv4.model.model import Model
from dsv4.quant.tensor import QTensor

OPTIONS = EngineOptions(max_context=512, max_sequences=4, prefill_chunk=512, draft_slack=8)
PROMPT = 300  # more than two blocks of 128, and four times what the indexer of a small model selects
# Of its beginning: every residue of a block of 128, and what lies about later borders of 64 and the end.
LENGTHS = (*range(1, 137), *range(188, 197), *range(252, 261), *range(292, 300))


def same(left: Tensor, right: Tensor) -> bool:
    """Equal shape, dtype and bits, and no number that is not finite: poison that was read is never equal."""
    if left.shape != right.shape or left.dtype != right.dtype or not bool(left.isfinite().all()):
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def poisoned(store: Store) -> Store:
    """The same, every number of it NaN."""
    for layer in store.layers:
        for tensor in layer.tensors():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 255)
    return store


@dataclass(repr=False)
class Rig:
    """A model in official numerics, a random prompt and its run in one piece."""

    config: ModelConfig
    weights: dict[str, Tensor | QTensor]
    length: int = PROMPT
    options: EngineOptions = OPTIONS
    ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.model = Model(self.config, self.weights, self.options)
        self.ids = self.random_ids(self.length, seed=self.length)

    @classmethod
    def open(cls, directory: Path, length: int = PROMPT) -> Rig:
        config = ModelConfig.load(directory)
        return cls(config, load(Checkpoint.open(directory), config), length)

    def random_ids(self, count: int, seed: int) -> list[int]:
        return random.Random(seed).choices(range(self.config.vocab_size), k=count)

    def store(self, points: int = 0, **changes: int) -> Store:
        """A store in which every number that was never written is NaN. `changes`: of the options."""
        return poisoned(Store(self.config, replace(self.options, **changes), points))

    def run(self, store: Store, *parts: tuple[int, Sequence[int]]) -> list[Tensor]:
        """One step that adds ids to slots: the streams [n, M, d] of each part."""
        out = self.model(self.model.batch([Segment(slot, store.mark(slot), ids) for slot, ids in parts]), store)
        for slot, ids in parts:
            store.advance(slot, len(ids))
        return list(out.streams.split([len(ids) for _, ids in parts]))

    def pieces(self, store: Store, ends: Sequence[int], slot: int = 0) -> Tensor:
        """The prompt from where the slot stands, one step up to each of `ends`: streams of all its tokens."""
        parts = []
        for end in ends:
            parts += self.run(store, (slot, self.ids[store.mark(slot) : end]))
        return torch.cat(parts)

    @cached_property
    def whole(self) -> Tensor:
        """Streams of every token of the prompt, run in one step in an empty cache. [n, M, d]."""
        self._whole_store = self.store()
        return self.pieces(self._whole_store, [self.length])

    @cached_property
    def whole_store(self) -> Store:
        """The cache behind `whole`."""
        assert self.whole.isfinite().all()
        return self._whole_store

    @cached_property
    def whole_logits(self) -> Tensor:
        """[n, V] of every token of the prompt, from one call."""
        return self.model.logits(self.whole)

    def logits(self, streams: Tensor) -> Tensor:
        """[V] of one token's streams, from a call of its own."""
        return self.model.logits(streams.unsqueeze(0))[0]


def state(store: Store, slot: int, main_layers: int) -> Iterator[tuple[str, Tensor]]:
    """What later tokens of a slot may read: window, entries, index keys and the compressor's open blocks, named."""
    length = store.mark(slot)
    for number, layer in enumerate(store.layers[:main_layers]):
        for name, tensor in _layer_state(layer, slot, length):
            yield f"layer {number} {name}", tensor


def _layer_state(layer: LayerStore, slot: int, length: int) -> Iterator[tuple[str, Tensor]]:
    here, layout = torch.tensor(slot), layer.layout
    window = torch.arange(max(0, length - min(128, layout.window)), length)
    yield "window", layer.kv[layout.window_rows(here, window)]
    if layout.ratio:
        entries = torch.arange(length // layout.ratio)
        pages = layer.table[slot, entries // layout.entries]
        yield "entries", layer.kv[layout.entry_rows(pages, entries)]
        yield "keys", layer.keys[layout.key_rows(pages, entries)] if layout.indexed else torch.zeros(0)
        first = (length // layout.ratio - layout.indexed) * layout.ratio  # overlapped: the block before it, too
        open_tokens = torch.arange(max(0, first), length)
        yield "tail", layer.tail[layout.tail_rows(here, open_tokens)]
        yield "key tail", layer.key_tail[layout.tail_rows(here, open_tokens)]


def different_state(left: Store, right: Store, main_layers: int, slots: tuple[int, int] = (0, 0)) -> list[str]:
    """Names of the parts in which two slots differ, or hold what was never written."""
    pairs = zip(state(left, slots[0], main_layers), state(right, slots[1], main_layers), strict=True)
    return [name for (name, a), (_, b) in pairs if not same(a, b)]
