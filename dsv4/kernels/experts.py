"""The routed experts on Hopper: who goes where, two matrices with all that is between them, and the sum."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.rows import multiprocessors
from dsv4.ops.experts import StoredExperts, routed_experts
from dsv4.ops.moe import Route
from dsv4.quant.formats import FP8_ROW
from dsv4.quant.packed import COLUMNS, ROWS, TILE_BYTES, Packed
from dsv4.quant.tensor import QTensor

# As csrc/expert_tokens.cu and csrc/experts.cu have them.
MOST_EXPERTS: Final = 1024
_THREADS: Final = {"tokens": 512, "matrix": 576, "sum": 256}
WIDE: Final = (8, 16, 32)  # tokens of a group
_TOKENS: Final = Kernel("expert_tokens.cu", "expert_tokens", "p p p p i i i i i p p p p p p")
_SUM: Final = Kernel("expert_tokens.cu", "expert_sum_bf16", "p p i i i p")
_MATRICES: Final = "p p p p p p i i i i"
_UP: Final = {n: Kernel("experts.cu", f"experts_up_{n}", _MATRICES + "f p p p") for n in WIDE}
_DOWN: Final = {n: Kernel("experts.cu", f"experts_down_{n}", _MATRICES + "p p") for n in WIDE}
_SHARED: Final = 228 << 10  # bytes of a multiprocessor
_WHOLE: Final = 227 << 10  # of them for one block
_RESERVED: Final = 1 << 10  # for each block, the driver's
_STAGES: Final = 8
_BESIDE: Final = 8  # groups of at most so many leave room for a second block, the next kernel's


class Groups(NamedTuple):
    """Who goes to which expert, as `expert_tokens` says it, and the rows of the first matrix: see there."""

    total: Tensor
    group: Tensor
    pair: Tensor
    weight: Tensor
    image: Tensor
    scale: Tensor


def wide(tokens: int, k: int, experts: int) -> int:
    """How many tokens a group has, twice what an expert gets on average: no choice here changes a bit."""
    return next((n for n in WIDE if n * experts >= 2 * tokens * k), WIDE[-1])


def most_groups(pairs: int, experts: int, wide: int) -> int:
    """Of so many pairs of token and expert: one that is not full for each expert."""
    short = min(pairs, experts)
    return short + (pairs - short) // wide


def memory(wide: int) -> tuple[int, int]:
    """Stages of the ring, and bytes of dynamic shared memory, as the kernels cut them up."""
    stage = TILE_BYTES + wide * (COLUMNS + 4)
    static = 1024 + wide * (COLUMNS + 64)  # that of `experts_up`
    room = _SHARED // 2 - _RESERVED if wide <= _BESIDE else _WHOLE
    stages = min(_STAGES, (room - static) // stage)
    return stages, stages * stage


def _refuse(x: QTensor, picks: Route, experts: StoredExperts, beside: Tensor, limit: float) -> str | None:
    if not x.data.is_cuda:
        return f"x is on {x.device}"
    if x.format is not FP8_ROW:
        return f"x is {x.format.name}"
    if beside.dtype != torch.bfloat16:
        return f"no kernel gives {str(beside.dtype).removeprefix('torch.')}"
    if len(experts.up.tiles) > MOST_EXPERTS:
        return f"{len(experts.up.tiles)} experts: at most {MOST_EXPERTS} fit"
    return None


@routed_experts.impl("fused", accepts=_refuse)
def _routed_experts(x: QTensor, picks: Route, experts: StoredExperts, beside: Tensor, limit: float) -> Tensor:
    (tokens, d), k, device = x.shape, picks.experts.shape[1], x.device
    count, width = len(experts.up.tiles), experts.down.shape[1]
    need(beside, "beside", shape=(tokens, d), dtype=torch.bfloat16, device=device, align=16)
    _need_packed(experts.up, "up", (2 * width, d), count, device)
    _need_packed(experts.down, "down", (d, width), count, device)
    if not tokens * k:
        return beside.clone()
    size = wide(tokens, k, count)
    most = most_groups(tokens * k, count, size)
    groups = _grouped(x, picks, count, size, most)
    hidden = torch.empty(most, width // COLUMNS, size, COLUMNS, dtype=torch.uint8, device=device)
    scale = torch.empty(most, width // COLUMNS, size, device=device)
    y = torch.empty(tokens, k, d, dtype=torch.bfloat16, device=device)
    up, down = _UP[size], _DOWN[size]
    _multiply(up, experts.up, groups.image, groups.scale, groups, most, limit, groups.weight, hidden, scale)
    _multiply(down, experts.down, hidden, scale, groups, most, groups.pair, y)
    out = torch.empty_like(beside)
    blocks = -(-tokens * (d // 8) // _THREADS["sum"])
    _SUM(blocks, _THREADS["sum"], y, beside, k, d, tokens, out, pdl=True)
    return out


def _grouped(x: QTensor, picks: Route, experts: int, size: int, most: int) -> Groups:
    (tokens, d), k, device = x.shape, picks.experts.shape[1], x.device
    need(x.data, "x", device=device, align=16)
    need(x.scale, "x scale", device=device)
    need(picks.experts, "experts", shape=(tokens, k), dtype=torch.int64, device=device)
    need(picks.weights, "weights", shape=(tokens, k), dtype=torch.float32, device=device)
    groups = Groups(
        torch.empty(1, dtype=torch.int32, device=device),
        torch.empty(most, 4, dtype=torch.int32, device=device),
        torch.empty(most, size, dtype=torch.int32, device=device),
        torch.empty(most, size, device=device),
        torch.empty(most, d // COLUMNS, size, COLUMNS, dtype=torch.uint8, device=device),
        torch.empty(most, d // COLUMNS, size, device=device),
    )
    sizes = (tokens, k, d // COLUMNS, experts, size)
    _TOKENS(experts, _THREADS["tokens"], *picks, x.data, x.scale, *sizes, *groups, pdl=True)
    return groups


def _multiply(
    kernel: Kernel, packed: Packed, x: Tensor, scale: Tensor, groups: Groups, most: int, *rest: Tensor | float
) -> None:
    """One matrix, by as many blocks as there are multiprocessors, if there is as much to do."""
    rows, columns = packed.shape
    heights, (stages, smem) = rows // ROWS, memory(x.shape[2])
    grid = min(multiprocessors(x.device), most * heights)
    given = (*packed, x, scale, groups.group, groups.total)
    kernel(grid, _THREADS["matrix"], *given, most, heights, columns // COLUMNS, stages, *rest, smem=smem, pdl=True)


def _need_packed(packed: Packed, name: str, shape: tuple[int, int], count: int, device: torch.device) -> None:
    rows, columns = shape
    tiles = (count, rows // ROWS, columns // COLUMNS, TILE_BYTES)
    need(packed.tiles, f"{name} tiles", shape=tiles, dtype=torch.uint8, device=device, align=16)
    need(packed.apart, f"{name} apart", shape=(count, rows // ROWS), dtype=torch.int32, device=device)
