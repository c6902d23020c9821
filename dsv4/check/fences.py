"""Tensors between fences: bytes 0xFF around and between their numbers, so that a stray read gives NaN and a stray write
is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsv4.quant.tensor import QTensor

GUARD: Final = 4096  # bytes on either side; no kernel aligns to more
FILL: Final = 0xFF  # NaN in every float format of ours, -1 in every signed integer

_EMPTY: Final = frozenset(
    {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided}
)
_ZEROED: Final = frozenset({torch.zeros, torch.zeros_like, Tensor.new_zeros})


class Fence(NamedTuple):
    """A tensor of any shape and strides inside a larger run of bytes."""

    view: Tensor
    run: Tensor  # uint8

    def trespass(self) -> int:
        """How many bytes that are not the tensor's own were written."""
        touched = self.run != FILL
        if self.view.numel():
            item, start = self.view.element_size(), self.view.storage_offset() * self.view.element_size()
            steps = [step * item for step in self.view.stride()]
            touched.as_strided((*self.view.shape, item), (*steps, 1), start).fill_(False)
        return int(touched.sum())


def fence(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Fence:
    """A tensor between fences, and filled as they are."""
    span = 1 + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) if 0 not in size else 0
    run = torch.full((2 * GUARD + span * dtype.itemsize,), FILL, dtype=torch.uint8, device=device)
    inner = run[GUARD : GUARD + span * dtype.itemsize].view(dtype)
    return Fence(inner.as_strided(tuple(size), tuple(stride)), run)


def fenced(x: Tensor, device: torch.device | str) -> Fence:
    """A copy of x between fences on `device`, with the strides of x."""
    made = fence(x.shape, x.stride(), x.dtype, device)
    made.view.copy_(x)
    return made


class Allocations(TorchFunctionMode):
    """Inside the block, what Python gets from torch, empty or zeroed, lies between fences, and the empty is all NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.fences: list[Fence] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in _EMPTY and func not in _ZEROED:
            return made
        self.fences.append(fence(made.shape, made.stride(), made.dtype, made.device))
        return self.fences[-1].view.zero_() if func in _ZEROED else self.fences[-1].view


def transform(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed: in tuples, named ones too, and in quantised matrices."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, QTensor):
        total = None if value.global_scale is None else change(value.global_scale)
        return dataclasses.replace(value, data=change(value.data), scale=change(value.scale), global_scale=total)
    if isinstance(value, tuple):
        parts = [transform(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
