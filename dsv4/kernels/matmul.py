"""Dense matrices times tokens on a GPU: BF16 pairs through the tensor cores, all else by FP32 multipliers.

Which of the two decides a row's bits, and follows from dtypes and width alone. Tensor cores have a form for few tokens
and one for many; these give the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels import rows
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.rows import NAMES
from dsv4.kernels.tiles import tensor_map
from dsv4.ops.linear import matmul

# As the sources have them.
_BOX: Final = 64  # columns
_BOX_BYTES: Final = 128
_SLICE: Final = 4  # boxes
_FEW_TOKENS: Final = 8
_FEW_STAGES: Final = (4, 24)  # fewest and most
_MANY_STAGES: Final = (3, 16)
_TILE_ROWS: Final = {16: 64, 32: 64, 64: 64, 128: 128}  # of the form for many, by its tokens
_ANY_ROWS: Final = 8  # of a block, and tokens
_ANY_TOKENS: Final = 4

_ANY: Final = {
    (x, w): Kernel("matmul.cu", f"matmul_{NAMES[x]}_{NAMES[w]}", "p l p p i i i i") for x in NAMES for w in NAMES
}
_FEW: Final = {r: Kernel("matmul_few.cu", f"matmul_few_{r}", "m p l p i i i i i") for r in (8, 16)}
_MANY: Final = {n: Kernel("matmul_many.cu", f"matmul_many_{n}", "m m p i i i i i") for n in _TILE_ROWS}

_PASSES: Final = 2**14  # rows times eights of tokens up to which the form for few takes several of them side by side
_RESERVED: Final = 2 << 10  # bytes of a block: the driver's, and the kernel's barriers


class Machine(NamedTuple):
    """processors: of the device. shared: bytes that one of them has for all of its blocks."""

    processors: int
    shared: int


class Few(NamedTuple):
    """The form for few tokens: rows of a tile, blocks side by side on tiles, stages of the ring, bytes of memory."""

    rows: int
    blocks: int
    stages: int
    smem: int


@lru_cache
def few(n: int, k: int, tokens: int, machine: Machine) -> Few | None:
    """For a matrix [n, k], or None where a row of tokens leaves no room. Two blocks to a multiprocessor if they fit.

    Tiles of 8 rows where those of 16 would leave multiprocessors without one.
    """
    height = 16 if n > 32 * machine.processors else 8
    boxes = -(-k // _BOX)
    fixed = boxes * min(tokens, _FEW_TOKENS) * _BOX_BYTES + 2 * -(-boxes // _SLICE) * height * _FEW_TOKENS * 4
    stage, tiles = _SLICE * height * _BOX_BYTES, -(-n // height)
    for beside in (2, 1):
        stages = (machine.shared // beside - _RESERVED - fixed) // stage
        if stages >= _FEW_STAGES[0]:
            stages = min(stages, _FEW_STAGES[1], -(-boxes // _SLICE) * -(-tiles // (beside * machine.processors)))
            return Few(height, min(tiles, beside * machine.processors), stages, stages * stage + fixed)
    return None


@lru_cache
def many(tokens: int, k: int, machine: Machine) -> tuple[int, int, int]:
    """The form for many: tokens of a tile, stages of the ring, bytes of memory. Two blocks to a multiprocessor."""
    wide = next((n for n in _TILE_ROWS if n >= tokens), max(_TILE_ROWS))
    stage = (_TILE_ROWS[wide] + wide) * _BOX_BYTES
    beside = 1 if wide == max(_TILE_ROWS) else 2
    room = (machine.shared // beside - _RESERVED) // stage
    stages = max(_MANY_STAGES[0], min(room, _MANY_STAGES[1], -(-k // _BOX)))
    return wide, stages, stages * stage


@lru_cache
def _machine(device: torch.device) -> Machine:
    found = torch.cuda.get_device_properties(device)
    return Machine(rows.multiprocessors(device), found.shared_memory_per_multiprocessor)


def on_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    """Whether tensor cores take the product: a matter of dtypes and width, never of the number of tokens."""
    return x.dtype == weight.dtype == torch.bfloat16 and weight.shape[1] % 8 == 0


def refuse_product(x: Tensor, weight: Tensor) -> str | None:
    """Why no kernel takes a product, or None."""
    for name, one in (("x", x), ("weight", weight)):
        if not one.is_cuda:
            return f"{name} is on {one.device}"
        if one.dtype not in NAMES:
            return f"{name} is {str(one.dtype).removeprefix('torch.')}"
    if x.dim() != 2 or x.stride(1) != 1 or not weight.is_contiguous():
        return f"strides are {list(x.stride())} and {list(weight.stride())}"
    return None if weight.numel() else "the matrix is empty"


@matmul.impl("fused", accepts=refuse_product)
def product(x: Tensor, weight: Tensor) -> Tensor:
    """`matmul`, for ops that begin with one."""
    (tokens, columns), height = x.shape, weight.shape[0]
    y = torch.empty(tokens, height, device=x.device)
    need(weight, "weight", shape=(height, columns), device=x.device)
    if not tokens or not on_tensor_cores(x, weight):
        blocks = -(-height // _ANY_ROWS)
        grid = blocks * -(-tokens // _ANY_TOKENS)
        _ANY[x.dtype, weight.dtype](grid, 256, x, x.stride(0), weight, y, height, columns, tokens, blocks, pdl=True)
        return y
    need(weight, "weight", align=16)
    if x.data_ptr() % 16 or (tokens > 1 and x.stride(0) % 8):
        x = x.clone(memory_format=torch.contiguous_format)
    machine = _machine(x.device)
    parts = -(-tokens // _FEW_TOKENS)
    form = few(height, columns, tokens, machine) if parts == 1 or height * parts <= _PASSES else None
    if form is not None:
        boxes, sizes = tensor_map(weight, form.rows, _BOX_BYTES), (height, columns, tokens)
        grid, stages = form.blocks * parts, form.stages
        _FEW[form.rows](grid, 288, boxes, x, x.stride(0), y, *sizes, parts, stages, smem=form.smem, pdl=True)
        return y
    wide, stages, smem = many(tokens, columns, machine)
    tiles = -(-height // _TILE_ROWS[wide])
    maps = (tensor_map(weight, _TILE_ROWS[wide], _BOX_BYTES), tensor_map(x, wide, _BOX_BYTES))
    grid = tiles * -(-tokens // wide)
    _MANY[wide](grid, 256, *maps, y, height, columns, tokens, tiles, stages, smem=smem, pdl=True)
    return y
