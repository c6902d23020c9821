"""A chunk of a prompt on a GPU: time of a layer against tokens and what lies behind, beside that of bytes and products.

Steps are those of the engine (`engine/runner.py`): all tokens of the chunk in one eager step, and logits of the last.
What is counted for the floor, `work.py` says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Final

from torch import Tensor

from dsv4.bench.clock import Call
from dsv4.bench.layers import KINDS
from dsv4.bench.slices import Bench, Sizes, Slice
from dsv4.bench.work import Chunk, chunk_bytes, chunk_flop
from dsv4.cache.store import Store
from dsv4.model.batch import Segment
from dsv4.model.model import Model


def sizes(chunk: Chunk) -> Sizes:
    """A cache for one prompt."""
    return Sizes(max_context=chunk.behind + chunk.tokens, max_sequences=1, prefill_chunk=chunk.tokens)


def made(model: Model, store: Store, chunk: Chunk) -> Call:
    """What runs the chunk: random tokens, which leave no expert out."""
    ids = random.Random(0).choices(range(model.config.vocab_size), k=chunk.tokens)
    segments = [Segment(0, chunk.behind, ids)]

    def run() -> Tensor:
        streams = model(model.batch(segments), store).streams
        return model.logits(streams[[chunk.tokens - 1]])

    return run


def counted(of: Slice, touched: float, chunk: Chunk) -> tuple[float, float]:
    """Bytes and FLOP of a layer."""
    given = of.config, of.own, KINDS[of.kind]
    return chunk_bytes(*given, touched, chunk), sum(chunk_flop(*given, chunk))


PREFILL: Final = Bench("prefill", sizes, made, counted, in_a_row=1, work=True)


def chunks(tokens: Sequence[int], behind: Sequence[int]) -> list[Chunk]:
    """Every number of tokens behind every number of them."""
    return sorted({Chunk(*pair) for pair in product(tokens, behind)})
