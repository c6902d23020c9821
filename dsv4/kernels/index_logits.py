"""Index logits on a GPU: how tokens and keys lie on blocks. No choice here changes a bit."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.matmul import Machine, machine_of
from dsv4.ops.index_logits import index_logits, layout_of
from dsv4.quant.index_keys import KEY_LAYOUTS, SCALE_BYTES, KeyLayout

# As csrc/common/index_logits.cuh has them.
_HEADS: Final = 64
_THREADS: Final = 128
_KEYS: Final = 128  # of a stage
_STAGES: Final = {"fp4": 4, "fp8": 3}
_OPERANDS: Final = _HEADS * 128 * 2  # bytes of a token's queries
_MOST_KEYS: Final = 2**20  # of a page
_WIDEST: Final = 2**28
_NEAR: Final = (4, 2, 1)
_BLOCKS: Final = {"fp4": 4, "fp8": 3}  # of a multiprocessor, at most
_BESIDE: Final = 3 << 10  # bytes of shared memory that a block has beside `smem`, at most
_START: Final = 2  # stages that it takes until a block has its first keys and queries
_SIGNATURE: Final = "p p p i p i i p l p p i i i i i p"
_KERNELS: Final = {name: Kernel("index_logits.cu", f"index_logits_{name}", _SIGNATURE) for name in KEY_LAYOUTS}


class Plan(NamedTuple):
    """near: tokens of a block, groups: blocks side by side on tokens, spans: on keys. smem in bytes."""

    near: int
    groups: int
    spans: int
    smem: int


@lru_cache
def plan(layout: KeyLayout, tokens: int, sequences: int, width: int, machine: Machine) -> Plan:
    """Tokens share a block where there have to be several of a sequence, if two blocks have room beside each other."""
    stages, units = _STAGES[layout.name], -(-width // _KEYS)
    ring = stages * _KEYS * sum(layout.sizes)

    def beside(near: int) -> int:
        return min(_BLOCKS[layout.name], machine.shared // (ring + near * _OPERANDS + _BESIDE))

    near = next((n for n in _NEAR if tokens >= n * sequences and beside(n) > 1), 1)
    groups = -(-tokens // near)
    at_once = machine.processors * max(1, beside(near))
    spans = min(range(1, min(units, at_once) + 1), key=lambda n: -(-groups * n // at_once) * (_START + -(-units // n)))
    return Plan(near, groups, spans, ring + near * _OPERANDS)


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
    if size % 16 or keys & (keys - 1) or not 0 < keys <= _MOST_KEYS:
        return f"a page of {size} bytes has {keys} keys; a multiple of 16 and a power of two up to {_MOST_KEYS} fit"
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
    form = plan(layout, tokens, len(table), width, machine_of(device))
    shift = layout.page_rows(pages.shape[1]).bit_length() - 1
    stored = (pages, pages.shape[1], shift, table, table.shape[1], slots, visible)
    sizes = (tokens, width, form.near, form.groups, form.spans)
    grid = form.groups * form.spans
    _KERNELS[layout.name](
        grid, _THREADS, q, q_scales, weights, heads, *stored, *sizes, logits, smem=form.smem, pdl=True
    )
    return logits
