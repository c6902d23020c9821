"""What runners that pretend hand to an engine."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dsv4.engine.runner import Ran


def joined(parts: Iterable[Ran]) -> Ran:
    """Of the pieces of a step's work, one behind another."""
    streams, logits = zip(*parts, strict=True)
    return Ran(torch.cat(streams), torch.cat(logits))
