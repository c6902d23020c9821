"""What a kernel asks of a tensor, checked on the host, with an error that names all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.errors import KernelError


def need(
    tensor: object,
    name: str,
    *,
    shape: Sequence[int | None] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | str | None = None,
    contiguous: bool = True,
    align: int = 1,
) -> None:
    """KernelError unless `tensor` is one of this shape (None: any extent), dtype, device and alignment in bytes.

    The error shows dtype, shape, stride and device that were got, and all that was wanted.
    """
    dtypes = dtype if isinstance(dtype, tuple) or dtype is None else (dtype,)
    if (
        isinstance(tensor, Tensor)
        and (shape is None or _matches(tensor.shape, shape))
        and (dtypes is None or tensor.dtype in dtypes)
        and (device is None or tensor.device == device or _is(tensor.device, torch.device(device)))
        and (not contiguous or tensor.is_contiguous())
        and (align == 1 or tensor.data_ptr() % align == 0)
    ):
        return
    wishes = (
        " or ".join(map(_plain, dtypes or ())),
        "" if shape is None else "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]",
        "contiguous" if contiguous else "",
        "" if device is None else f"on {device}",
        f"at a multiple of {align} bytes" if align > 1 else "",
    )
    place = f" at {tensor.data_ptr():#x}" if isinstance(tensor, Tensor) and align > 1 else ""
    raise KernelError(f"tensor {name}", got=describe(tensor) + place, wanted=" ".join(filter(None, wishes)))


def describe(value: object) -> str:
    """A value as an error shows it; of a tensor dtype, shape, stride and device, never its elements."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{_plain(value.dtype)} {list(value.shape)} with stride {list(value.stride())} on {value.device}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _matches(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    if tuple(shape) == tuple(wanted):  # the usual case, in a fifth of the time
        return True
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


def _is(device: torch.device, wanted: torch.device) -> bool:
    """ "cuda" is any CUDA device."""
    return device.type == wanted.type and (wanted.index is None or device.index == wanted.index)
