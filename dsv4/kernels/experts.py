"""The experts on Hopper, routed and shared: who goes where, two matrices with all that is between them, and the sum.

No kernel starts before the one in front of it is through: with early starts the op takes 1.4 times as long (LOG.md).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.rows import multiprocessors
from dsv4.ops.experts import SHARED, Stored, StoredExperts, stored_moe
from dsv4.ops.moe import Route
from dsv4.quant.formats import FP8_BLOCK, FP8_BLOCK_F32, FP8_ROW, MXFP4, NVFP4, Format
from dsv4.quant.packed import COLUMNS, ROWS, Packed, tile_bytes
from dsv4.quant.tensor import QTensor

# As csrc/expert_tokens.cu and csrc/common/experts.cuh have them.
MOST_EXPERTS: Final = 1024
_THREADS: Final = {"tokens": 512, "sum": 256}
_SOURCES: Final = {MXFP4: "mxfp4", NVFP4: "nvfp4", FP8_BLOCK: "fp8", FP8_BLOCK_F32: "fp8"}
_SHARED: Final = 227 << 10  # bytes of shared memory for one block
_TABLE: Final = 2 << 10  # of them for tables and barriers, at most
_STAGES: Final = 12


class Form(NamedTuple):
    """wide: tokens of a group. rows: of a piece of a matrix, which a block takes at a time. threads: of a block."""

    wide: int
    rows: int
    threads: int


FORMS: Final = (Form(8, 256, 576), Form(16, 256, 576), Form(32, 256, 576), Form(128, 128, 384))
_TOKENS: Final = Kernel("expert_tokens.cu", "expert_tokens", "p p p p i i i i i p p p p p p")
_SUM: Final = Kernel("expert_tokens.cu", "expert_sum_bf16", "p i i i p")
_MATRICES: Final = "p p p p p p p i i i i i"


def _kernels(name: str, signature: str) -> dict[tuple[str, int], Kernel]:
    return {
        (source, form.wide): Kernel(
            f"experts_{source}.cu", f"experts_{source}_{name}_{form.wide}", _MATRICES + signature
        )
        for source in dict.fromkeys(_SOURCES.values())
        for form in FORMS
    }


_UP: Final = _kernels("up", "f p p p")
_DOWN: Final = _kernels("down", "p p")


class Groups(NamedTuple):
    """Who goes to which expert, as `expert_tokens` says it, and the rows of the first matrix: see there."""

    total: Tensor
    group: Tensor
    pair: Tensor
    weight: Tensor
    image: Tensor
    scale: Tensor


def choose(tokens: int, k: int, experts: int) -> Form:
    """The form whose groups have twice what an expert gets on average: no choice here changes a bit."""
    return next((form for form in FORMS if form.wide * experts >= 2 * tokens * k), FORMS[-1])


def most_groups(tokens: int, k: int, experts: int, wide: int) -> int:
    """How many there can be: one that is not full for each expert, the shared one too."""
    pairs = tokens * k
    short = min(pairs, experts)
    return short + (pairs - short) // wide + -(-tokens // wide)


def memory(form: Form, fmt: Format) -> tuple[int, int]:
    """Stages of the ring, and bytes of dynamic shared memory, as the kernels cut them up."""
    weights = max(tile_bytes(fmt), tile_bytes(FP8_BLOCK)) * form.rows // ROWS
    stage = weights + form.wide * (COLUMNS + 4)
    static = _TABLE + form.wide * (COLUMNS + 64)
    stages = min(_STAGES, (_SHARED - static) // stage)
    return stages, stages * stage


def _refuse(x: QTensor, picks: Route, experts: StoredExperts, limit: float, dtype: torch.dtype) -> str | None:
    if not x.data.is_cuda:
        return f"x is on {x.device}"
    if x.format is not FP8_ROW:
        return f"x is {x.format.name}"
    if dtype != torch.bfloat16:
        return f"no kernel gives {str(dtype).removeprefix('torch.')}"
    if experts.many > MOST_EXPERTS:
        return f"{experts.many} experts: at most {MOST_EXPERTS} fit"
    formats = [part.format for part in (*experts.routed, *experts.shared)]
    if formats[0] not in _SOURCES or formats[0] is not formats[1] or not set(formats[2:]) <= set(SHARED):
        return "experts of " + ", ".join(fmt.name for fmt in formats)
    return None


@stored_moe.impl("fused", accepts=_refuse)
def _stored_moe(x: QTensor, picks: Route, experts: StoredExperts, limit: float, dtype: torch.dtype) -> Tensor:
    (tokens, d), k, device = x.shape, picks.experts.shape[1], x.device
    width = experts.routed.down.shape[1]
    _need_stored(experts.routed, "routed", (d, width), experts.many, device)
    _need_stored(experts.shared, "shared", (d, width), 1, device)
    out = torch.empty(tokens, d, dtype=dtype, device=device)
    if not tokens:
        return out
    form = choose(tokens, k, experts.many)
    most = most_groups(tokens, k, experts.many, form.wide)
    groups = _grouped(x, picks, experts.many, form.wide, most)
    hidden = torch.empty(most, width // COLUMNS, form.wide, COLUMNS, dtype=torch.uint8, device=device)
    scale = torch.empty(most, width // COLUMNS, form.wide, device=device)
    y = torch.empty(tokens, k + 1, d, dtype=dtype, device=device)
    _up(experts, form, groups, limit, hidden, scale)
    _down(experts, form, groups, hidden, scale, y)
    blocks = -(-tokens * (d // 8) // _THREADS["sum"])
    _SUM(blocks, _THREADS["sum"], y, k + 1, d, tokens, out)
    return out


def _grouped(x: QTensor, picks: Route, experts: int, size: int, most: int) -> Groups:
    (tokens, d), k, device = x.shape, picks.experts.shape[1], x.device
    _need_rows(x, picks)
    groups = Groups(
        torch.empty(1, dtype=torch.int32, device=device),
        torch.empty(most, 4, dtype=torch.int32, device=device),
        torch.empty(most, size, dtype=torch.int32, device=device),
        torch.empty(most, size, device=device),
        torch.empty(most, d // COLUMNS, size, COLUMNS, dtype=torch.uint8, device=device),
        torch.empty(most, d // COLUMNS, size, device=device),
    )
    sizes = (tokens, k, d // COLUMNS, experts, size)
    _TOKENS(experts + 1, _THREADS["tokens"], *picks, x.data, x.scale, *sizes, *groups)
    return groups


def _up(experts: StoredExperts, form: Form, groups: Groups, limit: float, hidden: Tensor, scale: Tensor) -> None:
    rest = (limit, groups.weight, hidden, scale)
    _multiply(_UP, experts, 0, form, groups.image, groups.scale, groups, ROWS, *rest)


def _down(experts: StoredExperts, form: Form, groups: Groups, hidden: Tensor, scale: Tensor, y: Tensor) -> None:
    _multiply(_DOWN, experts, 1, form, hidden, scale, groups, form.rows, groups.pair, y)


def _multiply(
    kernels: dict[tuple[str, int], Kernel],
    experts: StoredExperts,
    which: int,
    form: Form,
    x: Tensor,
    scale: Tensor,
    groups: Groups,
    task: int,
    *rest: Tensor | float,
) -> None:
    """One matrix, by as many blocks as there are multiprocessors, if there is as much to do. task: its rows."""
    routed, shared = experts.routed[which], experts.shared[which]
    (rows, columns), most = routed.shape, len(groups.group)
    heights, (stages, smem) = rows // task, memory(form, routed.format)
    grid = min(multiprocessors(x.device), most * heights)
    given = (routed.tiles, routed.apart, shared.tiles, x, scale, groups.group, groups.total)
    sizes = (experts.many, most, heights, columns // COLUMNS, stages)
    kernels[_SOURCES[routed.format], form.wide](grid, form.threads, *given, *sizes, *rest, smem=smem)


def _need_rows(x: QTensor, picks: Route) -> None:
    tokens, k, device = len(x), picks.experts.shape[1], x.device
    need(x.data, "x", device=device, align=16)
    need(x.scale, "x scale", device=device)
    need(picks.experts, "experts", shape=(tokens, k), dtype=torch.int64, device=device)
    need(picks.weights, "weights", shape=(tokens, k), dtype=torch.float32, device=device)


def _need_stored(stored: Stored, name: str, sizes: tuple[int, int], count: int, device: torch.device) -> None:
    d, width = sizes
    _need_packed(stored.up, f"{name} up", (2 * width, d), count, device)
    _need_packed(stored.down, f"{name} down", (d, width), count, device)


def _need_packed(packed: Packed, name: str, shape: tuple[int, int], count: int, device: torch.device) -> None:
    rows, columns = shape
    tiles = (count, rows // ROWS, columns // COLUMNS, tile_bytes(packed.format))
    need(packed.tiles, f"{name} tiles", shape=tiles, dtype=torch.uint8, device=device, align=16)
    need(packed.apart, f"{name} apart", shape=(count, rows // ROWS), dtype=torch.int32, device=device)
