"""Decode steps as CUDA graphs: one launch in place of twenty a layer.

Steps of one shape differ in token ids, slots and positions alone, and what follows from them (places in the caches,
turns, lists of rows) is computed inside. Lists are as long as the longest context of the shape asks for: entries that
are absent behind a token's own change none of its bits, so a step has the same ones in a graph and without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.cache.store import Store
from dsv4.cache.transfer import sent
from dsv4.model.batch import Segment, Unread, batch_of, laid_out
from dsv4.model.model import Model

SHORTEST: Final = 256  # tokens of context; from there on by powers of two
_MOST: Final = 128  # graphs that are kept


class Shape(NamedTuple):
    """tokens: of each sequence. longest: no context is longer."""

    sequences: int
    tokens: int
    longest: int


class Ran(NamedTuple):
    """streams [T, M, d] and logits [T, V] of a step's tokens, until the next step."""

    streams: Tensor
    logits: Tensor


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    given: Tensor  # int64 [3, T], read by every replay
    ran: Ran


class Graphs:
    """The decode steps of a model over a cache of stored rows."""

    def __init__(self, model: Model, store: Store) -> None:
        self._model, self._store = model, store
        self._pool = torch.cuda.graph_pool_handle()
        self._warm: set[Shape] = set()
        self._captured: OrderedDict[Shape, _Captured] = OrderedDict()

    def shape(self, segments: Sequence[Segment]) -> Shape | None:
        """None for a step whose sequences have different numbers of tokens."""
        counts = {len(segment.ids) for segment in segments}
        if len(counts) > 1:
            return None
        (count,) = counts
        end = max(segment.start for segment in segments) + count
        longest = max(SHORTEST, 1 << (end - 1).bit_length())
        return Shape(len(segments), count, min(longest, self._store.capacity))

    def run(self, segments: Sequence[Segment], shape: Shape, unread: Unread | None = None) -> Ran:
        """Run a step over all its tokens. The first of a shape is none: it builds and loads what a capture may not."""
        given = sent(torch.tensor(laid_out(segments)), self._store.table.device)
        if unread:
            unread.into(given)
        if shape in self._captured:
            self._captured.move_to_end(shape)
        elif shape in self._warm:
            self._captured[shape] = self._capture(shape)
            if len(self._captured) > _MOST:
                self._captured.popitem(last=False)
        else:
            self._warm.add(shape)
            return self._step(given, shape)
        captured = self._captured[shape]
        captured.given.copy_(given)
        captured.graph.replay()
        return captured.ran

    def _capture(self, shape: Shape) -> _Captured:
        given = torch.zeros(3, shape.sequences * shape.tokens, dtype=torch.int64, device=self._store.table.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            ran = self._step(given, shape)
        return _Captured(graph, given, ran)

    def _step(self, given: Tensor, shape: Shape) -> Ran:
        batch = batch_of(given, shape.longest, shape.tokens, {}, self._model.steps)
        streams = self._model(batch, self._store).streams
        return Ran(streams, self._model.logits(streams))
