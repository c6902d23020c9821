"""Index logits on a GPU: how tokens and keys lie on blocks. No choice here changes a bit."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.matmul import Machine, machine_of
from dsv4.ops.index_logits import index_logits, layout_of
from dsv4.quant.index_keys import SCALE_BYTES, KeyLayout

# As the sources have them.
_HEADS: Final = 64
_OPERANDS: Final = _HEADS * 128 * 2  # bytes of a token's queries
_KEYS: Final = (4, 2**20)  # of a page
_WIDEST: Final = 2**28
_NEAR: Final = (4, 2, 1)
_FEW: Final = 8  # multiprocessors to a block
_BESIDE: Final = 3 << 10  # bytes of shared memory that a block has beside `smem`, at most
_SIGNATURE: Final = "p p p i p i i p l p p i i i i i p"
_HOPPER_SIGNATURE: Final = "p p p i p i i p l i p p i i i i i p"


class Form(NamedTuple):
    """A kernel of one layout, and what `plan` has to know of it.

    tile: keys that are multiplied at once. team: tiles that a block has at the same time, at most. threads: of a tile.
    stages: of its ring. beside: bytes that a key has there beside its numbers. blocks: of a multiprocessor, at most.
    fewest: the same, for several tokens to share a block. start: rounds of tiles that it takes until a block has its
    first keys and queries. guesses: it is told how many sequences there are, and guesses a token's before it knows.
    """

    kernel: Kernel
    tile: int
    team: int
    threads: int
    stages: int
    beside: int
    blocks: int
    fewest: int
    start: int
    guesses: bool = False


_WIDE: Final = {  # for all but Hopper
    "fp4": Form(Kernel("index_logits.cu", "index_logits_fp4", _SIGNATURE), 128, 1, 128, 4, 4, 4, 2, 2),
    "fp8": Form(Kernel("index_logits.cu", "index_logits_fp8", _SIGNATURE), 128, 1, 128, 3, 4, 3, 2, 2),
}
_HOPPER: Final = {
    name: Form(
        Kernel("index_logits_hopper.cu", f"index_logits_hopper_{name}", _HOPPER_SIGNATURE),
        tile=128, team=4, threads=128, stages=2, beside=16, blocks=1, fewest=1, start=2, guesses=True,
    )
    for name in _WIDE
}  # fmt: skip


class Plan(NamedTuple):
    """near: tokens of a block, groups: blocks side by side on tokens, spans: on keys. team: its tiles at once."""

    near: int
    groups: int
    spans: int
    team: int


@lru_cache
def on_hopper(device: torch.device) -> bool:
    """Also where threads play it on a CPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)


def form_of(layout: KeyLayout, device: torch.device) -> Form:
    return (_HOPPER if on_hopper(device) else _WIDE)[layout.name]


@lru_cache
def plan(layout: KeyLayout, form: Form, tokens: int, sequences: int, width: int, machine: Machine) -> Plan:
    """Tokens share a block where there have to be several of a sequence, if there is room.

    Few blocks, of a tile each, are over sooner with two warpgroups to lay out queries than with four.
    """
    tiles = -(-width // form.tile)

    def beside(near: int) -> int:
        return min(form.blocks, machine.shared // (shared(layout, form, form.team, near) + _BESIDE))

    near = next((n for n in _NEAR if tokens >= n * sequences and beside(n) >= form.fewest), 1)
    groups = -(-tokens // near)
    at_once = machine.processors * max(1, beside(near))

    def cost(spans: int) -> tuple[int, int]:
        """Rounds of tiles; of equal ones more blocks are better."""
        return -(-groups * spans // at_once) * (form.start + -(-tiles // (spans * form.team))), -spans

    spans = min(range(1, min(tiles, at_once) + 1), key=cost)
    few = spans == tiles and _FEW * groups * tiles <= machine.processors
    return Plan(near, groups, spans, min(form.team, 2) if few else form.team)


def shared(layout: KeyLayout, form: Form, team: int, near: int) -> int:
    """Bytes of a block's dynamic shared memory."""
    return form.stages * form.tile * team * (layout.data_bytes + form.beside) + near * _OPERANDS


def _refuse(
    q: Tensor,
    q_scales: Tensor,
    weights: Tensor,
    pages: Tensor,
    table: Tensor,
    slots: Tensor,
    visible: Tensor,
    width: int,
) -> str | None:
    if not q.is_cuda:
        return f"q is on {q.device}"
    if not 0 < q.shape[1] <= _HEADS:
        return f"{q.shape[1]} heads, and 1 to {_HEADS} fit"
    if width > _WIDEST:
        return f"{width} logits a token, and up to {_WIDEST} fit"
    size, keys = pages.shape[1], layout_of(q).page_rows(pages.shape[1])
    least, most = _KEYS
    if size % 16 or keys & (keys - 1) or not least <= keys <= most:
        return f"a page of {size} bytes has {keys} keys; a multiple of 16 and a power of two, {least} to {most}, fit"
    return None


@index_logits.impl("fused", accepts=_refuse)
def _index_logits(
    q: Tensor,
    q_scales: Tensor,
    weights: Tensor,
    pages: Tensor,
    table: Tensor,
    slots: Tensor,
    visible: Tensor,
    width: int,
) -> Tensor:
    (tokens, heads, _), layout, device = q.shape, layout_of(q), q.device
    need(q, "q", shape=(tokens, heads, layout.data_bytes), dtype=torch.uint8, align=16)
    need(q_scales, "q_scales", shape=(tokens, heads, SCALE_BYTES), dtype=torch.uint8, device=device, align=4)
    need(weights, "weights", shape=(tokens, heads), dtype=torch.float32, device=device)
    need(pages, "pages", shape=(None, None), dtype=torch.uint8, device=device, align=16)
    need(table, "table", shape=(None, None), dtype=torch.int64, device=device)
    need(slots, "slots", shape=(tokens,), dtype=torch.int64, device=device)
    need(visible, "visible", shape=(tokens,), dtype=torch.int64, device=device)
    logits = torch.empty(tokens, width, device=device)
    if not logits.numel():
        return logits
    form = form_of(layout, device)
    launch = plan(layout, form, tokens, len(table), width, machine_of(device))
    shift = layout.page_rows(pages.shape[1]).bit_length() - 1
    rows = (len(table),) if form.guesses else ()
    stored = (pages, pages.shape[1], shift, table, table.shape[1], *rows, slots, visible)
    sizes = (tokens, width, launch.near, launch.groups, launch.spans)
    grid, threads = launch.groups * launch.spans, launch.team * form.threads
    smem = shared(layout, form, launch.team, launch.near)
    form.kernel(grid, threads, q, q_scales, weights, heads, *stored, *sizes, logits, smem=smem, pdl=True)
    return logits
