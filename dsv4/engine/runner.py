"""Runs one step's work through the model and keeps the cache in step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsv4.cache.store import Store
from dsv4.engine.scheduler import Work
from dsv4.model.batch import Segment
from dsv4.model.model import Model


class Runner:
    """The model with its cache."""

    def __init__(self, model: Model, store: Store) -> None:
        self.model, self.store = model, store

    def reset(self, slot: int) -> None:
        """Begin a new sequence in a slot."""
        self.store.reset(slot)

    def run(self, work: Sequence[Work]) -> Tensor:
        """Logits [n, V] FP32 of the last token of each item that asks for them, in the order of `work`."""
        segments = [Segment(w.request.slot, w.start, w.request.tokens(w.start, w.end)) for w in work]
        output = self.model(self.model.batch(segments), self.store)
        rows, end = [], 0
        for item, segment in zip(work, segments, strict=True):
            self.store.advance(segment.slot, len(segment.ids))
            end += len(segment.ids)
            if item.sample:
                rows.append(end - 1)
        return self.model.logits(output.streams[rows])
