"""Everything a layer needs to know of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.cache.layout import LayerLayout
from dsv4.cache.store import AnyLayer
from dsv4.cache.transfer import sent
from dsv4.config import ModelConfig
from dsv4.model.places import Closing, Places
from dsv4.model.pool import Pool, Run, pays
from dsv4.ops.rope import Rotation, frequencies, rotation
from dsv4.ops.step import WindowRows, rotations, window_rows


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence: `ids` go to positions start, start + 1, ... of `slot`."""

    slot: int
    start: int
    ids: Sequence[int]


class Unread(NamedTuple):
    """Token ids that the device has and the host does not know yet, and their places among a step's tokens."""

    places: list[int]
    ids: Tensor  # int64, as many

    def into(self, tokens: Tensor) -> None:
        """Write them into a step's tokens as `laid_out` has them, int64 [3, T], on the device."""
        tokens[0, sent(torch.tensor(self.places), tokens.device)] = self.ids


@dataclass(frozen=True)
class Batch:
    """T tokens of any number of sequences, one after another; integers are int64."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    plain: Rotation  # of the layers without compression
    yarn: Rotation  # of the layers that compress
    block_turns: Mapping[int, Rotation]  # by ratio: of the first positions of the tokens' blocks
    closing: Mapping[int, Closing | None]  # by ratio; None where no block ends
    longest: int  # largest position + 1
    most: int  # tokens of one sequence
    runs: tuple[Run, ...] = ()  # of tokens, where the host knows them
    _places: dict[LayerLayout, Places] = field(default_factory=dict)
    _windows: dict[tuple[int, int], WindowRows] = field(default_factory=dict)
    _pools: dict[LayerLayout, Pool | None] = field(default_factory=dict)

    def places(self, store: AnyLayer) -> Places:
        """Where this step reads and writes in this cache; one object for all layers of a `Store` that look alike."""
        layout = store.layout
        if layout not in self._places:
            ring = layout.window, layout.span
            if ring not in self._windows:
                self._windows[ring] = window_rows(self.slots, self.positions, *ring)
            given = store.table, self.slots, self.positions, self.longest, self._windows[ring]
            self._places[layout] = Places(layout, *given, self.closing.get(layout.ratio))
        return self._places[layout]

    def pool(self, store: AnyLayer, listed: int) -> Pool | None:
        """Where tokens see decoded rows; None where that does not pay. listed: entries of each token."""
        layout = store.layout
        if layout not in self._pools:
            given = self.runs, layout, store.table, self.slots, self.positions
            self._pools[layout] = Pool(*given) if pays(self.runs, layout, listed) else None
        return self._pools[layout]

    def turn(self, ratio: int) -> Rotation:
        """The rotation that layers of this ratio use, for queries, keys and outputs alike."""
        return self.yarn if ratio else self.plain


@dataclass(frozen=True)
class Steps:
    """The two tables of angular steps of a model, and the ratios whose blocks turn by their first positions."""

    plain: Tensor
    yarn: Tensor
    ratios: tuple[int, ...] = ()

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """What `rotations` takes: plain, YaRN, and YaRN of every ratio."""
        every = torch.tensor([1, 1, *self.ratios], device=self.plain.device)
        return torch.stack((self.plain, *[self.yarn] * (1 + len(self.ratios)))), every

    @classmethod
    def of(cls, config: ModelConfig, device: str, stored: bool = False) -> Steps:
        """Plain RoPE for layers without compression, YaRN for all others. Stored layers turn blocks as tokens come."""
        dims, scaling = config.qk_rope_head_dim, config.rope_scaling
        yarn = frequencies(
            dims,
            config.compress_rope_theta,
            scaling.factor,
            scaling.original_max_position_embeddings,
            scaling.beta_fast,
            scaling.beta_slow,
        )
        ratios = tuple(sorted(set(config.layer_ratios) - {0})) if stored else ()
        return cls(frequencies(dims, config.rope_theta).to(device), yarn.to(device), ratios)


def laid_out(segments: Sequence[Segment]) -> list[list[int]]:
    """Ids, slots and positions of all tokens, one segment after another."""
    ids = [i for s in segments for i in s.ids]
    slots = [s.slot for s in segments for _ in s.ids]
    return [ids, slots, [s.start + n for s in segments for n in range(len(s.ids))]]


def make_batch(segments: Sequence[Segment], ratios: Sequence[int], steps: Steps, unread: Unread | None = None) -> Batch:
    """Lay the segments out as one step. `ratios`: the compression ratios that occur in the model."""
    tokens = laid_out(segments)
    places = list(zip(tokens[1], tokens[2], strict=True))
    given = sent(torch.tensor(tokens), steps.plain.device)
    if unread:
        unread.into(given)
    closing = {ratio: _closing(places, ratio, steps.yarn) for ratio in set(ratios) if ratio}
    longest, most = max(s.start + len(s.ids) for s in segments), max(len(s.ids) for s in segments)
    runs = tuple(Run(s.slot, s.start, s.start + len(s.ids)) for s in segments)
    return replace(batch_of(given, longest, most, closing, steps), runs=runs)


def batch_of(tokens: Tensor, longest: int, most: int, closing: Mapping[int, Closing | None], steps: Steps) -> Batch:
    """A step of tokens as `laid_out` has them, int64 [3, T]. `longest` and `most` may be more than there are."""
    ids, slots, positions = tokens.unbind()
    plain, yarn, *firsts = rotations(positions, *steps.tables)
    block_turns = dict(zip(steps.ratios, firsts, strict=True))
    return Batch(ids, positions, slots, plain, yarn, block_turns, closing, longest, most)


def _closing(places: Sequence[tuple[int, int]], ratio: int, yarn: Tensor) -> Closing | None:
    closed = [(slot, p) for slot, p in places if (p + 1) % ratio == 0]
    if not closed:
        return None
    slots, ends = torch.tensor(closed, device=yarn.device).unbind(1)
    return Closing(slots, ends, rotation(ends + 1 - ratio, yarn))
