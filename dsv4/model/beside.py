"""Work that runs beside what is launched behind it: on a GPU in a stream of its own, on a CPU where it stands.

Tensors that a branch reads must outlive its `join`; what it makes may be read by others behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


class Beside:
    """One branch, which begins behind all that was launched before."""

    def __init__(self, device: torch.device, number: int) -> None:
        """Branches of equal numbers are one behind another."""
        self._stream = _stream(device, number) if device.type == "cuda" else None
        self._ended: torch.cuda.Event | None = None

    @contextmanager
    def run(self, again: bool = False) -> Iterator[None]:
        """Launch the block's work in the branch. again: it needs nothing that was launched since the branch began."""
        if self._stream is None:
            yield
            return
        if not again:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
            self.mark()

    def mark(self) -> None:
        """Of what runs in the branch, a later `join` waits for what was launched so far, or up to a later mark."""
        if self._stream is not None:
            self._ended = self._stream.record_event()

    def join(self) -> None:
        """What is launched from here on waits for the branch, as far as it has a mark."""
        if self._ended is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._ended)


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
