"""Matrices times BF16 tokens on a GPU, and dense ones of any kind.

Pairs of BF16 go through the tensor cores, and so do groups of E4M3 rows, all else through FP32 multipliers: a row's
bits follow from dtypes and width alone. Tensor cores have a form for few tokens and one for many, of the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels import rows
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.rows import NAMES
from dsv4.kernels.tiles import tensor_map
from dsv4.ops.linear import grouped_linear, matmul
from dsv4.quant.formats import FP8_BLOCK
from dsv4.quant.tensor import QTensor

# As the sources have them.
_BOX_BYTES: Final = 128
_SLICE: Final = 4  # boxes
FEW_TOKENS: Final = 8
FEW_STAGES: Final = (4, 24)  # fewest and most
_MANY_STAGES: Final = (2, 16)
_TILE_ROWS: Final = {16: 64, 32: 64, 64: 64, 128: 128}  # of the form for many, by its tokens
_WHOLE: Final = 128  # rows and columns: no tile of any form is in two groups
_ANY_ROWS: Final = 8  # of a block, and tokens
_ANY_TOKENS: Final = 4

_ANY: Final = {
    (x, w): Kernel("matmul.cu", f"matmul_{NAMES[x]}_{NAMES[w]}", "p l p p i i i i") for x in NAMES for w in NAMES
}


class Stored(NamedTuple):
    """How a matrix lies in boxes of 128 bytes a row: columns of one, boxes of tokens beside it, boxes of a chain."""

    columns: int
    beside: int
    chain: int


class Forms(NamedTuple):
    """Kernels for few tokens, by the rows of their tiles, and for many, by the tokens of theirs."""

    stored: Stored
    few: Mapping[int, Kernel]
    many: Mapping[int, Kernel]


def _forms(stored: Stored, few: Mapping[int, str], many: str) -> Forms:
    return Forms(
        stored,
        {r: Kernel("matmul_few.cu", name, "m p p l p i i i i i i") for r, name in few.items()},
        {n: Kernel("matmul_many.cu", f"{many}_{n}", "m p m p i i i i i i") for n in _TILE_ROWS},
    )


_BF16: Final = Stored(64, 1, _SLICE)
_E4M3: Final = Stored(128, 2, 1)
_DENSE: Final = _forms(_BF16, {8: "matmul_few_8", 16: "matmul_few_16"}, "matmul_many")
_GROUPED: Final = {
    "bfloat16": _forms(_BF16, {16: "grouped_few_bf16"}, "grouped_many_bf16"),
    FP8_BLOCK.name: _forms(_E4M3, {16: "grouped_few_e4m3"}, "grouped_many_e4m3"),
}

STORED: Final = {kind: forms.stored for kind, forms in _GROUPED.items()}

_PASSES: Final = 2**14  # rows times eights of tokens up to which the form for few takes several of them side by side
RESERVED: Final = 2 << 10  # bytes of a block: the driver's, and the kernel's barriers


class Machine(NamedTuple):
    """processors: of the device. shared: bytes that one of them has for all of its blocks."""

    processors: int
    shared: int


class Few(NamedTuple):
    """The form for few tokens: blocks side by side on tiles, stages of the ring, bytes of memory."""

    blocks: int
    stages: int
    smem: int


def few_bytes(rows: int, k: int, tokens: int, stored: Stored) -> tuple[int, int]:
    """Of a stage of the form for few, and of what a block has beside its ring: tokens, and the sums of two tiles."""
    boxes = -(-k // stored.columns)
    sums = 2 * -(-boxes // stored.chain) * rows * FEW_TOKENS * 4
    return _SLICE * rows * _BOX_BYTES, boxes * stored.beside * tokens * _BOX_BYTES + sums


def tile_rows(n: int, machine: Machine) -> int:
    """8 where tiles of 16 would leave multiprocessors without one."""
    return 16 if n > 32 * machine.processors else 8


@lru_cache
def few(
    rows: int, n: int, k: int, tokens: int, machine: Machine, stored: Stored = _BF16, groups: int = 1
) -> Few | None:
    """For a matrix [n, k], or None where a row of tokens leaves no room. Two blocks to a multiprocessor if they fit."""
    stage, fixed = few_bytes(rows, k, min(tokens, FEW_TOKENS), stored)
    slices, tiles = -(-k // (_SLICE * stored.columns)), -(-n // rows) // groups
    for beside in (2, 1):
        stages = (machine.shared // beside - RESERVED - fixed) // stage
        if stages >= FEW_STAGES[0]:
            blocks = min(tiles, max(1, beside * machine.processors // groups))  # of a group
            stages = min(stages, FEW_STAGES[1], slices * -(-tiles // blocks))
            return Few(blocks * groups, stages, stages * stage + fixed)
    return None


@lru_cache
def many(tokens: int, k: int, machine: Machine, stored: Stored = _BF16) -> tuple[int, int, int]:
    """The form for many: tokens of a tile, stages of the ring, bytes of memory. Two blocks to a multiprocessor."""
    wide = next((n for n in _TILE_ROWS if n >= tokens), max(_TILE_ROWS))
    stage = (_TILE_ROWS[wide] + stored.beside * wide) * _BOX_BYTES
    beside = 1 if wide == max(_TILE_ROWS) else 2
    room = (machine.shared // beside - RESERVED) // stage
    stages = max(_MANY_STAGES[0], min(room, _MANY_STAGES[1], -(-k // stored.columns)))
    return wide, stages, stages * stage


@lru_cache
def machine_of(device: torch.device) -> Machine:
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
    _launch(_DENSE, weight, None, x, y, 1)
    return y


def _launch(forms: Forms, weight: Tensor, scale: Tensor | None, x: Tensor, y: Tensor, groups: int) -> None:
    """y [T, N] of x [T, G * K] by the tensor cores; of weight [N, K] each N / G rows have K columns of their own."""
    need(weight, "weight", device=x.device, align=16)
    x, machine, tokens, (height, columns) = aligned(x), machine_of(x.device), len(x), weight.shape
    if parts := parts_of(tokens, height):
        rows = tile_rows(height, machine) if forms is _DENSE else 16
        form = few(rows, height, columns, tokens, machine, forms.stored, groups)
        if form is not None:
            boxes, sizes = tensor_map(weight, rows, _BOX_BYTES), (height, columns, tokens, groups, parts, form.stages)
            given, grid = (boxes, scale, x, x.stride(0), y), form.blocks * parts
            forms.few[rows](grid, 288, *given, *sizes, smem=form.smem, pdl=True)
            return
    wide, stages, smem = many(tokens, columns, machine, forms.stored)
    tiles = -(-height // _TILE_ROWS[wide])
    boxes, beside = tensor_map(weight, _TILE_ROWS[wide], _BOX_BYTES), tensor_map(x, wide, _BOX_BYTES)
    sizes, grid = (height, columns, tokens, tiles, groups, stages), tiles * -(-tokens // wide)
    forms.many[wide](grid, 256, boxes, scale, beside, y, *sizes, smem=smem, pdl=True)


def parts_of(tokens: int, height: int) -> int:
    """Blocks side by side on so many tokens, where the form for few takes them with so many rows; else none."""
    parts = -(-tokens // FEW_TOKENS)
    return parts if parts == 1 or height * parts <= _PASSES else 0


def aligned(x: Tensor) -> Tensor:
    """The same rows [T, K], each at a multiple of 16 bytes, as copies want them."""
    bytes_apart = x.stride(0) * x.element_size() if len(x) > 1 else 0
    return x.clone(memory_format=torch.contiguous_format) if (x.data_ptr() | bytes_apart) % 16 else x


def kind_of(weight: Tensor | QTensor) -> str:
    """The dtype or the format of a matrix, by name."""
    return weight.format.name if isinstance(weight, QTensor) else str(weight.dtype).removeprefix("torch.")


def refuse_groups(x: Tensor, weight: Tensor | QTensor) -> str | None:
    """Why no kernel takes the products of groups, or None."""
    data = weight.data if isinstance(weight, QTensor) else weight
    if not (x.is_cuda and data.is_cuda):
        return f"x is on {x.device}, the weight on {data.device}"
    if x.dtype != torch.bfloat16 or kind_of(weight) not in _GROUPED:
        return f"x is {str(x.dtype).removeprefix('torch.')} and the weight {kind_of(weight)}"
    if not x.is_contiguous() or not data.is_contiguous():
        return f"strides are {list(x.stride())} and {list(data.stride())}"
    groups, (rows, columns) = x.shape[1], weight.shape
    if not rows or rows % (_WHOLE * groups) or columns % _WHOLE:
        return f"{groups} matrices of {rows / groups:g} x {columns}: wanted multiples of {_WHOLE}"
    return None


@grouped_linear.impl("fused", accepts=refuse_groups)
def group_products(x: Tensor, weight: Tensor | QTensor) -> Tensor:
    """`grouped_linear`, for ops that begin with it."""
    tokens, groups, columns = x.shape
    data, scale = (weight.data, weight.scale) if isinstance(weight, QTensor) else (weight, None)
    need(data, "weight", shape=(None, columns))
    y = torch.empty(tokens, data.shape[0], dtype=x.dtype, device=x.device)
    if tokens:
        _launch(_GROUPED[kind_of(weight)], data, scale, x.flatten(1), y, groups)
    return y
