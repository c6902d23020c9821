"""Named taps on intermediate tensors, for tests and for comparing two paths.

`tap` is free when nobody listens: one truth test of a module-level list. It is an observer only; nothing in the
mathematics may depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Listener = Callable[[str, int, "Tensor"], None]
_listeners: list[Listener] = []


def tap(name: str, layer: int, tensor: Tensor) -> None:
    """Show `tensor` to whoever listens, under `name` of `layer` (-1 outside the layers)."""
    if _listeners:
        for listener in _listeners:
            listener(name, layer, tensor)


def heard() -> bool:
    """Whether anybody listens."""
    return bool(_listeners)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener(name, layer, tensor)` for every tap inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
