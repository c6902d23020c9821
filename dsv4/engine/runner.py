"""Runs one step's work through the model and keeps the cache in step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv4 import taps
from dsv4.cache.store import Store
from dsv4.cache.transfer import sent
from dsv4.engine.graphs import Graphs
from dsv4.engine.graphs import Ran as Ran
from dsv4.engine.scheduler import Work
from dsv4.model.batch import Segment, Unread
from dsv4.model.model import Model


class Runner:
    """The model with its cache."""

    def __init__(self, model: Model, store: Store, graphs: bool = False) -> None:
        """`graphs`: replay decode steps as CUDA graphs, where layers are stored and all ops are kernels."""
        self.model, self.store = model, store
        self._graphs = Graphs(model, store) if graphs else None

    def run(self, work: Sequence[Work], unread: Unread | None = None) -> Ran:
        """Launch a step; when it has run, the cache holds every token of it, drafts included.

        Streams of all tokens of each item and logits of those `asked` about, one item behind another.
        """
        for item in work:
            self.store.assign(item.request.slot, item.request.pages)
        segments = [Segment(w.request.slot, w.start, w.tokens) for w in work]
        ran = self._step(work, segments, unread)
        for segment in segments:
            self.store.advance(segment.slot, len(segment.ids))
        return ran

    def _step(self, work: Sequence[Work], segments: Sequence[Segment], unread: Unread | None) -> Ran:
        """Streams of all tokens, and logits of those that are asked about."""
        decodes = all(item.asked == item.size for item in work)
        if self._graphs and decodes and not taps.heard() and (shape := self._graphs.shape(segments)):
            return self._graphs.run(segments, shape, unread)
        streams = self.model(self.model.batch(segments, unread), self.store).streams
        rows: list[int] = []
        end = 0
        for item in work:
            end += item.size
            rows += range(end - item.asked, end)
        return Ran(streams, self.model.logits(streams[sent(torch.tensor(rows, dtype=torch.int64), streams.device)]))

    def rehearse(self, chunk: int, draft: int) -> None:
        """Run a step as large as any can be: memory that it lacks is missed now, and not in the middle of answers.

        Every slot decodes with `draft` guesses at the end of the context, and `chunk` tokens of a prompt end there too.
        No request may be there yet; what is written is nobody's.
        """
        end, few, vocabulary = self.store.capacity, 1 + draft, self.model.config.vocab_size
        counts = largest_step(chunk, draft, len(self.store.lengths), end)
        runs = [[n % vocabulary for n in range(count)] for count in counts]  # so that no expert is left out
        segments = [Segment(slot, end - len(ids), ids) for slot, ids in enumerate(runs)]
        streams = self.model(self.model.batch(segments), self.store).streams
        self.model.logits(streams[-few * len(counts) :])

    def rehearse_graph(self, tokens: int) -> None:
        """Capture the graph of a decode step of one sequence, `tokens` of it, in a short context.

        Only where the runner has graphs. No request may be there yet.
        """
        assert self._graphs is not None
        segments = [Segment(0, 0, [0] * min(tokens, self.store.capacity))]
        shape = self._graphs.shape(segments)
        assert shape is not None
        for _ in range(2):  # the first step of a shape is no graph yet
            self._graphs.run(segments, shape)


def largest_step(chunk: int, draft: int, slots: int, context: int) -> list[int]:
    """Tokens of each slot in the largest step: all decode with a draft, and one has a chunk of a prompt beside it."""
    few = 1 + draft
    return [min(count, context) for count in (chunk + few, *[few] * (slots - 1))]
