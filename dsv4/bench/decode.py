"""A whole decode step on a GPU, sampling included: time against context and sequences, beside that of its bytes.

Steps are those of the engine: one CUDA graph (`engine/graphs.py`), with all that depends on positions inside, and
behind it the choice of tokens, with noise (`engine/choose.py`), which is not waited for. No block of a compressor ends
in the step, as in three of four (of a ratio of 4) or 127 of 128. On the host a step is laid out and launched;
scheduling and text are not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from dsv4.bench.clock import Call
from dsv4.bench.layers import KINDS
from dsv4.bench.slices import Bench, Sizes, Slice
from dsv4.cache.store import Store
from dsv4.checkpoint.reads import Point, layer_bytes
from dsv4.engine.choose import Row, draw
from dsv4.engine.graphs import Graphs
from dsv4.engine.request import Sampling
from dsv4.model.batch import Segment
from dsv4.model.model import Model


def sizes(point: Point) -> Sizes:
    """A cache for so many sequences, of which each step adds one token to each."""
    return Sizes(max_context=point.context, max_sequences=point.sequences, prefill_chunk=1)


def made(model: Model, store: Store, point: Point) -> Call:
    """What runs a step: a token of every sequence, at the end of its context."""
    segments = [Segment(slot, point.context - 2, [slot + 1]) for slot in range(point.sequences)]
    rows = [Row(Sampling(seed=slot), point.context - 1) for slot in range(point.sequences)]
    graphs = Graphs(model, store)
    shape = graphs.shape(segments)
    assert shape is not None

    def run() -> Tensor:
        return draw(graphs.run(segments, shape).logits, rows).tokens

    return run


def counted(of: Slice, touched: float, point: Point) -> tuple[float, float]:
    """Bytes that a layer must read. Products are none to speak of."""
    return layer_bytes(of.config, of.own, KINDS[of.kind], touched, point), 0.0


DECODE: Final = Bench("decode", sizes, made, counted, in_a_row=8)  # the host is ahead of the GPU, as in an engine


def points(contexts: Sequence[int], sequences: Sequence[int], at: int) -> list[Point]:
    """A token behind each of the contexts, and as many sequences as these behind `at` tokens."""
    return sorted({Point(1, context) for context in contexts} | {Point(count, at) for count in sequences})
