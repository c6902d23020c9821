"""What lies in memory while something runs: bytes of all tensors' storages, now and at worst."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dsv4.quant.packed import Packed


class Allocated(TorchDispatchMode):
    """Counts the storages that ops make while it is entered, each until it is freed. `worst`: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.worst = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_iter(out):
            if isinstance(one, Tensor):
                self.count(one)
        return out

    def begin(self, owner: object) -> int:
        """Count what is there already; the bytes of it."""
        for tensor in tensors_of(owner):
            self.count(tensor)
        return self.now

    def count(self, tensor: Tensor) -> None:
        """One whose storage may be new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.now += size
        self.worst = max(self.worst, self.now)

        def freed(_: object) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)


def tensors_of(owner: object, known: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that an object of the model holds, however deep; each storage once."""
    known = set() if known is None else known
    if isinstance(owner, Tensor):
        key = owner.untyped_storage()._cdata
        if key not in known:
            known.add(key)
            yield owner
    elif isinstance(owner, list | tuple):
        for one in owner:
            yield from tensors_of(one, known)
    elif isinstance(owner, dict):
        yield from tensors_of(list(owner.values()), known)
    elif isinstance(owner, Packed) or _is_ours(owner):
        yield from tensors_of(list(vars(owner).values()), known)


def _is_ours(owner: object) -> bool:
    return type(owner).__module__.startswith("dsv4.") and hasattr(owner, "__dict__")


def nbytes_of(*owners: object) -> int:
    """Bytes of the storages behind them."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(owners))
