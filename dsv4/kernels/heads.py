"""What kernels over the vectors of heads share: one warp a vector."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels.launch import need
from dsv4.kernels.rows import NAMES, WARP_COLUMNS
from dsv4.ops.rope import Rotation

MOST: Final = 512  # dimensions that a warp holds in registers
_WARPS: Final = 8  # of a block, where there are many vectors
_FEW: Final = 1024  # vectors; for fewer the blocks are smaller, so that they spread over the multiprocessors


class Heads(NamedTuple):
    """x [T, H, D] or [T, D] as a kernel takes it. chunks: of a warp, the number at the end of a kernel's name."""

    grid: int
    block: int
    arguments: tuple[int, int, int, int, int]  # strides of token and head, vectors, heads, D
    chunks: int

    @classmethod
    def of(cls, x: Tensor) -> Heads:
        tokens, heads, n = x.shape if x.dim() == 3 else (x.shape[0], 1, x.shape[1])
        vectors = tokens * heads
        warps = _WARPS if vectors > _FEW else 4
        strides = (x.stride(0), x.stride(1) if x.dim() == 3 else 0)
        return cls(-(-vectors // warps), 32 * warps, (*strides, vectors, heads, n), 1 if n <= WARP_COLUMNS else 2)


def refuse_heads(name: str, x: Tensor, most: int = MOST) -> str | None:
    """Why kernels cannot read x [T, H, D] or [T, D] as vectors, or None."""
    if not x.is_cuda:
        return f"{name} is on {x.device}"
    if x.dtype not in NAMES:
        return f"{name} is {str(x.dtype).removeprefix('torch.')}"
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        return f"{name} has shape {list(x.shape)} and stride {list(x.stride())}"
    if not 0 < x.shape[-1] <= most:
        return f"vectors of {name} are {x.shape[-1]} long, and 1 to {most} fit"
    return None if x.numel() // x.shape[-1] < 2**31 else f"{name} has 2^31 vectors or more"


def refuse_eights(dims: int, turn: Rotation) -> str | None:
    """Why a kernel that turns eight dimensions at a time cannot take these, or None."""
    turned = turn.cos.shape[-1]
    if dims % 8 or turned % 8 or turned > dims:
        return f"{turned} of {dims} dimensions are rotated: both have to be multiples of 8"
    return None


def need_turn(turn: Rotation, tokens: int, device: torch.device) -> int:
    """KernelError unless the rotation is of so many tokens, on this device; the number of dimensions that it turns."""
    dims = turn.cos.shape[-1]
    for name, part in zip(turn._fields, turn, strict=True):
        need(part, f"turn.{name}", shape=(tokens, dims), dtype=torch.float32, device=device)
    return dims
