"""A given text through the model, every next token predicted from the true ones before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsv4.cache.store import Store
from dsv4.config import EngineOptions
from dsv4.llm import LLM
from dsv4.model.batch import Segment
from dsv4.model.model import Model


def served(llm: LLM) -> tuple[Model, EngineOptions]:
    """The model that an `LLM` answers with, and the options it was built with: what the functions below ask for."""
    return llm.engine._runner.model, llm.resolved.options


def forced_streams(
    model: Model, options: EngineOptions, ids: Sequence[int], chunk: int | None = None
) -> Iterator[Tensor]:
    """Streams [n, M, d] behind the last layer, for `chunk` (None: `options.prefill_chunk`) ids after another.

    Uses a cache of its own, just long enough; `options` are those the model was built with. The bits do not depend on
    `chunk`.
    """
    size = min(chunk or options.prefill_chunk, len(ids))
    if not size:
        return
    store = Store(
        model.config, replace(options, max_context=len(ids), max_sequences=1, prefill_chunk=size, cache_tokens=None)
    )
    for start in range(0, len(ids), size):
        segment = Segment(0, start, ids[start : start + size])
        yield model(model.batch([segment]), store).streams
        store.advance(0, len(segment.ids))


def forced_logits(
    model: Model, options: EngineOptions, ids: Sequence[int], chunk: int | None = None
) -> Iterator[Tensor]:
    """Logits [n, V] FP32 a chunk, as `forced_streams`: row i of all chunks together predicts ids[i + 1]."""
    yield from map(model.logits, forced_streams(model, options, ids, chunk))


def losses(model: Model, options: EngineOptions, ids: Sequence[int], chunk: int | None = None) -> Tensor:
    """[len(ids) - 1] FP64 on the CPU: -ln p of each token behind the first, in nats."""
    targets = torch.tensor(ids[1:], dtype=torch.int64)
    parts, start = [torch.empty(0, dtype=torch.float64)], 0
    for logits in forced_logits(model, options, ids, chunk):
        wanted = targets[start : start + len(logits)].to(logits.device)
        parts.append(nats(logits[: len(wanted)], wanted).cpu())
        start += len(logits)
    return torch.cat(parts)


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of one target a row: logits [n, V], targets [n] int64 -> [n] FP64."""
    return -torch.log_softmax(logits.double(), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
