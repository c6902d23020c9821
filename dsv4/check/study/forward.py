"""Passages through a model, every next token predicted from the true ones before it, many passages a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dsv4.cache.store import Store
from dsv4.check.study.sample import Passage
from dsv4.config import EngineOptions
from dsv4.model.batch import Segment
from dsv4.model.model import Model

Pack = list[Passage]


def packs(passages: Iterable[Passage], chunk: int) -> list[Pack]:
    """Neighbouring passages that fit into one step of `chunk` tokens together; a longer one goes alone."""
    found: list[Pack] = []
    room = 0
    for passage in passages:
        if not found or len(passage.ids) > room:
            found.append([])
            room = chunk
        found[-1].append(passage)
        room -= len(passage.ids)
    return found


def room_for(options: EngineOptions, work: Iterable[Pack]) -> EngineOptions:
    """`options` with a cache that is just large enough for the largest pack."""
    sizes = [(len(pack), max(len(passage.ids) for passage in pack)) for pack in work]
    slots, longest = max(slots for slots, _ in sizes), max(longest for _, longest in sizes)
    return EngineOptions(
        numerics="official",
        dtype=options.dtype,
        device=options.device,
        max_context=longest,
        max_sequences=slots,
        prefill_chunk=options.prefill_chunk,
    )


def forward(model: Model, store: Store, pack: Pack, chunk: int) -> list[Tensor]:
    """Logits of every predicted token of each passage of a pack: [`predicted`, V] FP32 each.

    A passage's last token predicts nothing and does not run.
    """
    streams: list[list[Tensor]] = [[] for _ in pack]
    for slot, segments in enumerate(_steps(pack, chunk)):
        if not slot:
            for number in range(len(pack)):
                store.reset(number)
        out = model(model.batch(segments), store).streams
        parts = out.split([len(segment.ids) for segment in segments])
        for segment, part in zip(segments, parts, strict=True):
            store.advance(segment.slot, len(segment.ids))
            streams[segment.slot].append(part)
    rows = [torch.cat(parts)[passage.start - 1 :] for parts, passage in zip(streams, pack, strict=True)]
    return list(model.logits(torch.cat(rows)).split([len(part) for part in rows]))


def _steps(pack: Sequence[Passage], chunk: int) -> Iterator[list[Segment]]:
    for start in range(0, max(len(passage.ids) for passage in pack) - 1, chunk):
        inputs = [passage.ids[start : min(start + chunk, len(passage.ids) - 1)] for passage in pack]
        yield [Segment(slot, start, ids) for slot, ids in enumerate(inputs) if ids]
