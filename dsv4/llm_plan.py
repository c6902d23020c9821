"""Whether a model fits on a GPU, with how much context and for how many at once, and how fast it can be at best.

All from headers: no weight is read, and no GPU is needed. What is planned for is stored layers whose ops are kernels
(`--device cuda`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsv4.cache.layout import CacheBytes, cache_parts, page_count, page_tokens, table_width
from dsv4.checkpoint.held import held_by_part, loading_bytes, refuse_unstored
from dsv4.checkpoint.hub import find_model
from dsv4.checkpoint.ledger import Ledger, balance
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reader import INDEX_NAME, Checkpoint
from dsv4.checkpoint.reads import Point, Reads, step_bytes
from dsv4.checkpoint.specs import StoredFormats
from dsv4.config import EngineOptions, ModelConfig
from dsv4.config_named import NAMED
from dsv4.llm_gpus import Gpu
from dsv4.llm_options import draft_guesses, fitted
from dsv4.llm_workspace import Workspace, workspace

OUTSIDE: Final = 700 << 20  # bytes that are torch's to give to nobody: CUDA's context, the code of kernels; an estimate
_MOST_SEQUENCES: Final = 1 << 16


class Floor(NamedTuple):
    """A decode step: bytes that must be read, and what they take; no engine is faster. fits: whether there is room."""

    point: Point
    nbytes: float
    seconds: float
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences."""
        return self.point.sequences / self.seconds


@dataclass(frozen=True)
class Plan:
    """Bytes of everything for one model, one GPU and these options."""

    source: str
    config: ModelConfig
    options: EngineOptions
    ledger: Ledger
    gpu: Gpu

    @cached_property
    def guesses(self) -> int:
        """Tokens of the draft a step; 0: it is not loaded."""
        return draft_guesses(self.config, self.options)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Once loaded, by part."""
        return held_by_part(self.ledger.params)

    @cached_property
    def loading(self) -> int:
        """Weights at worst while they are loaded."""
        return loading_bytes(self.ledger.params)

    def cache(self, options: EngineOptions) -> CacheBytes:
        """What `Store` allocates; the table of pages, INT64, counts as rings."""
        rings, pages, kept = cache_parts(self.config, options)
        return CacheBytes(rings + 8 * options.max_sequences * table_width(self.config, options), pages, kept)

    def workspace(self, options: EngineOptions) -> Workspace:
        """Of the largest step."""
        return workspace(self.config, options)

    def needed(self, options: EngineOptions) -> int:
        """In all: the cache is there before the weights are packed, and the largest step comes behind that."""
        loaded = sum(self.weights.values()) + self.workspace(options).total
        return OUTSIDE + sum(self.cache(options)) + max(self.loading, loaded)

    def free(self, options: EngineOptions) -> int:
        """Bytes of the GPU that are left; below 0: that are lacking."""
        return self.gpu.memory - self.needed(options)

    @cached_property
    def longest(self) -> int:
        """Tokens of context that one sequence can have at most, alone; 0: there is room for none."""

        def room(context: int) -> bool:
            return self.free(replace(self.options, max_context=context, max_sequences=1, cache_tokens=None)) >= 0

        return _most(room, self.config.max_position_embeddings)

    @cached_property
    def most_sequences(self) -> int:
        """How many can have the context that was asked for, all at once."""
        return _most(lambda count: self._has_room(Point(count, self.options.max_context)), _MOST_SEQUENCES)

    def floors(self, points: Sequence[Point]) -> list[Floor]:
        """Of decode steps without a draft, whose sequences have caches for their context and no more."""
        found, weights = [], Reads.of(self.ledger.params)
        for point in points:
            nbytes = step_bytes(self.config, weights, point)
            found.append(Floor(point, nbytes, nbytes / self.gpu.reads, self._has_room(point)))
        return found

    def _has_room(self, point: Point) -> bool:
        asked = replace(self.options, max_context=point.context, max_sequences=point.sequences, cache_tokens=None)
        return self.free(asked) >= 0

    def facts(self, points: Sequence[Point]) -> dict[str, Any]:
        """All of it as one JSON object: bytes, tokens, seconds."""
        options, cache, steps = self.options, self.cache(self.options), self.workspace(self.options)
        page = page_tokens(self.config)
        return {
            "source": self.source,
            "gpu": self.gpu._asdict(),
            "options": {name: getattr(options, name) for name in _OPTIONS} | {"draft_tokens": self.guesses},
            "weights": {"files": self.ledger.nbytes, "parts": self.weights, "loaded": sum(self.weights.values())},
            "loading": self.loading,
            "cache": {
                "total": sum(cache),
                **cache._asdict(),
                "tokens": page_count(self.config, options) * page,
                "per_token": cache.pages / max(1, page_count(self.config, options) * page),
                "per_sequence": cache.rings / options.max_sequences,
                "per_kept": cache.kept / options.reuse_points if options.reuse_points else 0,
            },
            "workspace": {**steps._asdict(), "total": steps.total},
            "outside": OUTSIDE,
            "needed": self.needed(options),
            "free": self.free(options),
            "fits": self.free(options) >= 0,
            "longest_context": self.longest,
            "most_sequences": self.most_sequences,
            "floors": [
                {**one.point._asdict(), "nbytes": round(one.nbytes), "seconds": one.seconds, "fits": one.fits,
                 "tokens_per_second": one.tokens_per_second}
                for one in self.floors(points)
            ],
        }  # fmt: skip


_OPTIONS: Final = ("max_context", "max_sequences", "prefill_chunk", "cache_tokens", "reuse_points")


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 0 to `limit` that fits, if all below it do too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def make_plan(target: str, options: EngineOptions, gpu: Gpu) -> Plan:
    """For a named configuration, a checkpoint (directory or ORG/NAME), or a directory with no more than a config.json.

    ConfigError, CheckpointError: what `LLM.load` would refuse before it reads weights, and what cannot be stored.
    """
    directory = target if target in NAMED else str(find_model(target))
    config = ModelConfig.find(directory)
    options = fitted(replace(options, device="cuda", stored=True, kernels="auto"), config)
    draft = draft_guesses(config, options) > 0
    if target not in NAMED and _has_weights(Path(directory)):
        ledger, read = balance(config, Checkpoint.open(directory).specs, draft), "headers of its files"
    else:
        formats = StoredFormats.of(config)
        ledger, read = Ledger(tuple(parameters(config, formats, draft)), {}, formats), "its configuration alone"
    refuse_unstored(config, ledger.formats)
    return Plan(f"{target} ({read})", config, options, ledger, gpu)


def _has_weights(directory: Path) -> bool:
    return (directory / INDEX_NAME).exists() or any(directory.glob("*.safetensors"))
