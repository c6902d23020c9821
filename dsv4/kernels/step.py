"""What follows from a step's positions, on a GPU."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel, need
from dsv4.ops.rope import Rotation
from dsv4.ops.step import BlockRows, WindowRows, block_rows, rotations, window_rows

_THREADS: Final = 128  # csrc/step.cu
_ROTATIONS: Final = Kernel("step.cu", "rotations", "p i p p i i p p")
_WINDOW: Final = Kernel("step.cu", "window_rows", "p p i i i p p")
_BLOCKS: Final = Kernel("step.cu", "block_rows", "p p p l i i i i p p p")


def _refuse(positions: Tensor) -> str | None:
    return None if positions.is_cuda else f"the positions are on {positions.device}"


@rotations.impl("fused", accepts=lambda positions, steps, every: _refuse(positions))
def _rotations(positions: Tensor, steps: Tensor, every: Tensor) -> tuple[Rotation, ...]:
    (tokens,), (tables, pairs), device = positions.shape, steps.shape, positions.device
    need(positions, "positions", dtype=torch.int64)
    need(steps, "steps", dtype=torch.float32, device=device)
    need(every, "every", shape=(tables,), dtype=torch.int64, device=device)
    cos, sin = (torch.empty(tables, tokens, 2 * pairs, device=device) for _ in range(2))
    blocks = -(-tables * tokens * pairs // _THREADS)
    _ROTATIONS(blocks, _THREADS, positions, tokens, steps, every, tables, pairs, cos, sin, pdl=True)
    return tuple(Rotation(*turn) for turn in zip(cos, sin, strict=True))


def _refuse_window(slots: Tensor, positions: Tensor, ring: int, span: int) -> str | None:
    return _refuse(positions) or (None if ring >= span > 0 else f"{span} positions are seen in a ring of {ring}")


@window_rows.impl("fused", accepts=_refuse_window)
def _window_rows(slots: Tensor, positions: Tensor, ring: int, span: int) -> WindowRows:
    tokens = _tokens(slots, positions)
    write, seen = torch.empty_like(positions), positions.new_empty(tokens, span)
    across = -(-span // _THREADS)
    _WINDOW(tokens * across, _THREADS, slots, positions, ring, span, across, write, seen, pdl=True)
    return WindowRows(write, seen)


def _refuse_blocks(slots: Tensor, positions: Tensor, table: Tensor, ratio: int, page: int, count: int) -> str | None:
    return _refuse(positions) or (None if min(ratio, page) > 0 else f"pages of {page} entries of {ratio} tokens")


@block_rows.impl("fused", accepts=_refuse_blocks)
def _block_rows(slots: Tensor, positions: Tensor, table: Tensor, ratio: int, page: int, count: int) -> BlockRows:
    tokens = _tokens(slots, positions)
    need(table, "table", shape=(None, None), dtype=torch.int64, device=positions.device)
    visible, own, rows = torch.empty_like(positions), torch.empty_like(positions), positions.new_empty(tokens, count)
    across = max(1, -(-count // _THREADS))
    given = (slots, positions, table, table.shape[1], ratio, page, count, across)
    _BLOCKS(tokens * across, _THREADS, *given, visible, own, rows, pdl=True)
    return BlockRows(visible, own, rows)


def _tokens(slots: Tensor, positions: Tensor) -> int:
    need(positions, "positions", shape=(None,), dtype=torch.int64)
    need(slots, "slots", shape=positions.shape, dtype=torch.int64, device=positions.device)
    return len(positions)
