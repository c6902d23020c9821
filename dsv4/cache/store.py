"""The tensors behind the layout, addressed by sequence slot and position.

Everything is either a ring addressed by position or a row addressed by block number, and nothing is read that was not
written for the position it is read for. So a new sequence needs no clearing, and taking tokens back sets a number.
"""

from __future__ import annotations

import torch

from dsv4.cache.layout import LayerLayout, layouts, reach
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import RequestError


class LayerStore:
    """One layer's tensors for all slots."""

    def __init__(self, layout: LayerLayout, slots: int, dtype: torch.dtype, device: str) -> None:
        self.layout = layout
        self.kv = torch.zeros(slots * layout.stride, layout.width, dtype=dtype, device=device)
        self.keys = torch.zeros(slots * layout.entries, layout.key_width, dtype=dtype, device=device)
        self.tail = torch.zeros(slots * layout.tail, 2, layout.tail_width, device=device)
        self.key_tail = torch.zeros(slots * layout.tail, 2, layout.key_tail_width, device=device)


class Store:
    """The cache of `options.max_sequences` sequences, and how far each has come."""

    def __init__(self, config: ModelConfig, options: EngineOptions) -> None:
        dtype = getattr(torch, options.dtype)
        self.layers = [
            LayerStore(layout, options.max_sequences, dtype, options.device) for layout in layouts(config, options)
        ]
        self.capacity = options.max_context
        self.reach = reach(options)
        self.lengths = [0] * options.max_sequences
        self._written = [0] * options.max_sequences

    def reset(self, slot: int) -> None:
        """Begin a new sequence in this slot."""
        self.lengths[slot] = self._written[slot] = 0

    def advance(self, slot: int, tokens: int) -> None:
        """Count tokens whose state has been written."""
        assert 0 <= tokens <= self.reach
        assert self.lengths[slot] + tokens <= self.capacity
        self.lengths[slot] += tokens
        self._written[slot] = max(self._written[slot], self.lengths[slot])

    def mark(self, slot: int) -> int:
        """A point to come back to: the number of tokens so far."""
        return self.lengths[slot]

    def rewind(self, slot: int, mark: int) -> None:
        """Forget every token after `mark`. RequestError if more were written since than the rings still hold."""
        if not 0 <= mark <= self.lengths[slot] or self._written[slot] - mark > self.reach:
            raise RequestError(
                "cannot rewind that far",
                got=f"position {mark} of {self._written[slot]}",
                wanted=f"at most {self.reach} tokens back",
                do="raise draft_slack",
            )
        self.lengths[slot] = mark
