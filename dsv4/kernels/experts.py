"""The experts on Hopper, routed and shared: who goes where, two matrices with all that is between them, and the sum.

Up to eight tokens are the business of two kernels: blocks of the first find out by themselves who goes where, in the
second whoever comes last adds up. No kernel starts before the one in front of it is through: with early starts the op
takes 1.4 times as long (LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
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

# As csrc/expert_tokens.cu, csrc/common/expert_list.cuh and csrc/common/experts.cuh have them.
MOST_EXPERTS: Final = 1024
FEW: Final = 8  # tokens up to which two kernels do all
_MOST_CHOICES: Final = 8  # of a token, for these
_THREADS: Final = {"tokens": 512, "sum": 256}
_SOURCES: Final = {MXFP4: "mxfp4", NVFP4: "nvfp4", FP8_BLOCK: "fp8", FP8_BLOCK_F32: "fp8"}
_SHARED: Final = 228 << 10  # bytes of shared memory of a multiprocessor
_RESERVED: Final = 1 << 10  # of them for each block, the driver's
_TABLE: Final = 2 << 10  # for tables and barriers of a block, at most
_LIST: Final = 6 << 10  # for the list of groups that blocks of few tokens make
_STAGES: Final = 12


class Form(NamedTuple):
    """wide: tokens of a group. rows: of a piece of a matrix, which a block takes at a time. threads: of a block.

    beside: blocks of a multiprocessor.
    """

    wide: int
    rows: int
    threads: int
    beside: int = 1


FORMS: Final = (Form(8, 256, 576), Form(16, 256, 576), Form(32, 256, 576), Form(128, 128, 384))
_UP_FEW, _DOWN_FEW = Form(FEW, 256, 576), Form(FEW, 128, 320, 2)
_TOKENS: Final = Kernel("expert_tokens.cu", "expert_tokens", "p p p p i i i i i p p p p p p")
_SUM: Final = Kernel("expert_tokens.cu", "expert_sum_bf16", "p i i i p")
_MATRICES: Final = "p p p p p p p i i i i i"
_CHOSEN: Final = "p p p p p p p i i i i i i"


def _kernels(name: str, signature: str, few: str) -> dict[tuple[str, int], Kernel]:
    """By source and tokens of a group; 0: the kernel for few tokens."""
    found = {}
    for source in dict.fromkeys(_SOURCES.values()):
        file, start = f"experts_{source}.cu", f"experts_{source}_{name}"
        found[source, 0] = Kernel(file, f"{start}_few", _CHOSEN + few)
        found |= {(source, form.wide): Kernel(file, f"{start}_{form.wide}", _MATRICES + signature) for form in FORMS}
    return found


_UP: Final = _kernels("up", "f p p p", "f p p p i")
_DOWN: Final = _kernels("down", "p p", "p p p")


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


def memory(form: Form, fmt: Format, resident: int = 0) -> tuple[int, int]:
    """Stages of the ring, and bytes of dynamic shared memory, as the kernels cut them up.

    resident: blocks of columns of which all tokens lie beside the ring.
    """
    weights = max(tile_bytes(fmt), tile_bytes(FP8_BLOCK)) * form.rows // ROWS
    tokens = form.wide * (COLUMNS + 4)
    static = _TABLE + form.wide * (COLUMNS + 64) + (_LIST if form in (_UP_FEW, _DOWN_FEW) else 0)
    room = _SHARED // form.beside - _RESERVED - static - resident * tokens
    stage = weights if resident else weights + tokens
    stages = min(_STAGES, room // stage)
    return stages, stages * stage + resident * tokens


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
    wide, width = experts.routed.down.shape  # d, and rows of zeros
    _need_stored(experts.routed, "routed", (d, width), experts.many, device)
    _need_stored(experts.shared, "shared", (d, width), 1, device)
    _need_rows(x, picks)
    if few(tokens, k, d):
        return _few(x, picks, experts, limit, dtype)
    out = torch.empty(tokens, wide, dtype=dtype, device=device)
    if not tokens:
        return _whole(out, d)
    form = choose(tokens, k, experts.many)
    most = most_groups(tokens, k, experts.many, form.wide)
    groups = _grouped(x, picks, experts.many, form.wide, most)
    hidden, scale = _hidden(most, width, form.wide, device)
    y = torch.empty(tokens, k + 1, wide, dtype=dtype, device=device)
    _up(experts, form, groups, limit, hidden, scale)
    _down(experts, form, groups, hidden, scale, y)
    blocks = -(-tokens * (wide // 8) // _THREADS["sum"])
    _SUM(blocks, _THREADS["sum"], y, k + 1, wide, tokens, out)
    return _whole(out, d)


def _whole(out: Tensor, d: int) -> Tensor:
    """The first d columns, in memory of their own."""
    return out if out.shape[1] == d else out[:, :d].contiguous()


def few(tokens: int, k: int, d: int) -> bool:
    """Whether two kernels do all: blocks of the first hold all tokens beside some stages of the ring."""
    return 0 < tokens <= FEW and k <= _MOST_CHOICES and memory(_UP_FEW, FP8_BLOCK, d // COLUMNS)[0] >= 2


def _few(x: QTensor, picks: Route, experts: StoredExperts, limit: float, dtype: torch.dtype) -> Tensor:
    up, down = few_parts(x, picks, experts, limit, dtype)
    up()
    return down()


def few_parts(
    x: QTensor, picks: Route, experts: StoredExperts, limit: float, dtype: torch.dtype
) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """The two kernels for few tokens."""
    (tokens, d), k, device = x.shape, picks.experts.shape[1], x.device
    source, (wide, width), most = _SOURCES[experts.routed.up.format], experts.routed.down.shape, tokens * k + 1
    hidden, scale = _hidden(most, width, FEW, device)
    arrived = torch.empty(wide // _DOWN_FEW.rows, dtype=torch.int32, device=device)
    y = torch.empty(tokens, k + 1, wide, dtype=dtype, device=device)

    def launch(kernel: Kernel, which: int, form: Form, task: int, resident: int, *rest: Tensor | float) -> None:
        routed, shared = experts.routed[which], experts.shared[which]
        rows, columns = routed.shape
        stages, smem = memory(form, routed.format, resident)
        given = (routed.tiles, routed.apart, shared.tiles, *picks)
        from_, sizes = (x.data, x.scale) if resident else (hidden, scale), (tokens, k, experts.many, rows // task)
        grid = min(form.beside * multiprocessors(device), most * (rows // task))
        kernel(grid, form.threads, *given, *from_, *sizes, columns // COLUMNS, stages, *rest, smem=smem, pdl=True)

    def up() -> None:
        rest = (limit, hidden, scale, arrived, len(arrived))
        launch(_UP[source, 0], 0, _UP_FEW, ROWS, d // COLUMNS, *rest)

    def down() -> Tensor:
        out = torch.empty(tokens, wide, dtype=dtype, device=device)
        launch(_DOWN[source, 0], 1, _DOWN_FEW, _DOWN_FEW.rows, 0, y, arrived, out)
        return _whole(out, d)

    return up, down


def _hidden(groups: int, width: int, wide: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the second matrix reads, and its scales."""
    blocks = width // COLUMNS
    data = torch.empty(groups, blocks, wide, COLUMNS, dtype=torch.uint8, device=device)
    return data, torch.empty(groups, blocks, wide, device=device)


def _grouped(x: QTensor, picks: Route, experts: int, size: int, most: int) -> Groups:
    (tokens, d), k, device = x.shape, picks.experts.shape[1], x.device
    groups = Groups(
        torch.empty(1, dtype=torch.int32, device=device),
        torch.empty(most, 4, dtype=torch.int32, device=device),
        torch.empty(most, size, dtype=torch.int32, device=device),
        torch.empty(most, size, device=device),
        torch.empty(most, d // COLUMNS, size, COLUMNS, dtype=torch.uint8, device=device),
        torch.empty(most, d // COLUMNS, size, device=device),
    )
    sizes = (tokens, k, d // COLUMNS, experts, size)
    # Who helps the shared expert has four rows of 128 columns a thread, as long as there are multiprocessors for it.
    helpers = min(-(-tokens * (d // COLUMNS) // (4 * _THREADS["tokens"] // 8)), 2 * multiprocessors(device))
    _TOKENS(experts + helpers, _THREADS["tokens"], *picks, x.data, x.scale, *sizes, *groups)
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
    _need_packed(stored.down, f"{name} down", (-(-d // ROWS) * ROWS, width), count, device)


def _need_packed(packed: Packed, name: str, shape: tuple[int, int], count: int, device: torch.device) -> None:
    rows, columns = shape
    tiles = (count, rows // ROWS, columns // COLUMNS, tile_bytes(packed.format))
    need(packed.tiles, f"{name} tiles", shape=tiles, dtype=torch.uint8, device=device, align=16)
    need(packed.apart, f"{name} apart", shape=(count, rows // ROWS), dtype=torch.int32, device=device)
