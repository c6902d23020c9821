"""Everything a layer needs to know of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4.cache.layout import LayerLayout
from dsv4.cache.store import AnyLayer
from dsv4.config import ModelConfig
from dsv4.model.places import Closing, Places
from dsv4.ops.rope import Rotation, frequencies, rotation


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence: `ids` go to positions start, start + 1, ... of `slot`."""

    slot: int
    start: int
    ids: Sequence[int]


@dataclass(frozen=True)
class Batch:
    """T tokens of any number of sequences, one after another; integers are int64."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    plain: Rotation  # of the layers without compression
    yarn: Rotation  # of the layers that compress
    closing: Mapping[int, Closing | None]  # by ratio; None where no block ends
    longest: int  # largest position + 1
    most: int  # tokens of one sequence
    steps: Steps
    _places: dict[LayerLayout, Places] = field(default_factory=dict)
    _block_turns: dict[int, Rotation] = field(default_factory=dict)

    def places(self, store: AnyLayer) -> Places:
        """Where this step reads and writes in this cache; one object for all layers of a `Store` that look alike."""
        layout = store.layout
        if layout not in self._places:
            closing = self.closing.get(layout.ratio)
            self._places[layout] = Places(layout, store.table, self.slots, self.positions, self.longest, closing)
        return self._places[layout]

    def block_turn(self, ratio: int) -> Rotation:
        """The rotations of the first positions of the tokens' blocks of `ratio`, [T, R]."""
        if ratio not in self._block_turns:
            self._block_turns[ratio] = rotation(self.positions // ratio * ratio, self.steps.yarn)
        return self._block_turns[ratio]

    def turn(self, ratio: int) -> Rotation:
        """The rotation that layers of this ratio use, for queries, keys and outputs alike."""
        return self.yarn if ratio else self.plain


@dataclass(frozen=True)
class Steps:
    """The two tables of angular steps of a model."""

    plain: Tensor
    yarn: Tensor

    @classmethod
    def of(cls, config: ModelConfig, device: str) -> Steps:
        """Plain RoPE for layers without compression, YaRN for all others."""
        dims, scaling = config.qk_rope_head_dim, config.rope_scaling
        yarn = frequencies(
            dims,
            config.compress_rope_theta,
            scaling.factor,
            scaling.original_max_position_embeddings,
            scaling.beta_fast,
            scaling.beta_slow,
        )
        return cls(frequencies(dims, config.rope_theta).to(device), yarn.to(device))


def laid_out(segments: Sequence[Segment]) -> list[list[int]]:
    """Ids, slots and positions of all tokens, one segment after another."""
    ids = [i for s in segments for i in s.ids]
    slots = [s.slot for s in segments for _ in s.ids]
    return [ids, slots, [s.start + n for s in segments for n in range(len(s.ids))]]


def make_batch(segments: Sequence[Segment], ratios: Sequence[int], steps: Steps) -> Batch:
    """Lay the segments out as one step. `ratios`: the compression ratios that occur in the model."""
    tokens = laid_out(segments)
    places = list(zip(tokens[1], tokens[2], strict=True))
    closing = {ratio: _closing(places, ratio, steps.yarn) for ratio in set(ratios) if ratio}
    longest, most = max(s.start + len(s.ids) for s in segments), max(len(s.ids) for s in segments)
    return batch_of(torch.tensor(tokens, device=steps.plain.device), longest, most, closing, steps)


def batch_of(tokens: Tensor, longest: int, most: int, closing: Mapping[int, Closing | None], steps: Steps) -> Batch:
    """A step of tokens as `laid_out` has them, int64 [3, T]. `longest` and `most` may be more than there are."""
    ids, slots, positions = tokens.unbind()
    plain, yarn = rotation(positions, steps.plain), rotation(positions, steps.yarn)
    return Batch(ids, positions, slots, plain, yarn, closing, longest, most, steps)


def _closing(places: Sequence[tuple[int, int]], ratio: int, yarn: Tensor) -> Closing | None:
    closed = [(slot, p) for slot, p in places if (p + 1) % ratio == 0]
    if not closed:
        return None
    slots, ends = torch.tensor(closed, device=yarn.device).unbind(1)
    return Closing(slots, ends, rotation(ends + 1 - ratio, yarn))
