"""The first half of the output projection to stored rows, on Hopper: one kernel for few tokens, two for many."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from torch import Tensor

from dsv4.kernels import matmul
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.quantize import quantize_rows
from dsv4.kernels.rows import stored_rows
from dsv4.kernels.tiles import ClusterForm, tensor_map
from dsv4.ops.linear_grouped import grouped_linear_quant
from dsv4.quant.formats import FP8_BLOCK, FP8_ROW, Format
from dsv4.quant.tensor import QTensor

# As csrc/grouped_quant.cu has them.
_ROWS: Final = 16  # of a tile
_SCALED: Final = 128  # rows under one scale, which are a cluster's
_TILES: Final = _SCALED // _ROWS
_KEPT: Final = 4096  # bytes, and more than it takes
_KERNELS: Final = {
    kind: Kernel("grouped_quant.cu", f"grouped_quant_{name}", "m p p l p p i i i i i i")
    for kind, name in (("bfloat16", "bf16"), (FP8_BLOCK.name, "e4m3"))
}


@lru_cache
def form(rows: int, columns: int, tokens: int, machine: matmul.Machine, stored: matmul.Stored) -> ClusterForm | None:
    """For a matrix, or None where tokens leave no room: all rows at once if they can be, by as many blocks as can."""
    parts, few = -(-tokens // matmul.FEW_TOKENS), min(tokens, matmul.FEW_TOKENS)
    stage, fixed = matmul.few_bytes(_ROWS, columns, few, stored)
    for beside in (2, 1):
        stages = (machine.shared // beside - matmul.RESERVED - fixed - _KEPT) // stage
        if stages < matmul.FEW_STAGES[0]:
            continue
        # Parts of the GPU have different numbers of multiprocessors: clusters leave some idle.
        room = beside * machine.processors
        most = {8: room // 2, 4: room * 5 // 6, 2: room}
        cluster = next((n for n, held in most.items() if rows // _SCALED * parts * n <= held), 1)
        turns = _TILES // cluster
        stages = min(stages, matmul.FEW_STAGES[1], turns * -(-columns // (4 * stored.columns)))
        return ClusterForm(cluster, turns, stages, stages * stage + fixed + _KEPT)
    return None


def _refuse(x: Tensor, weight: Tensor | QTensor, fmt: Format) -> str | None:
    return matmul.refuse_groups(x, weight) or (None if fmt is FP8_ROW else f"no kernel stores {fmt.name} so")


@grouped_linear_quant.impl("fused", accepts=_refuse)
def _grouped_linear_quant(x: Tensor, weight: Tensor | QTensor, fmt: Format) -> QTensor:
    (tokens, groups, columns), (rows, _) = x.shape, weight.shape
    data, scale = (weight.data, weight.scale) if isinstance(weight, QTensor) else (weight, None)
    kind, parts = matmul.kind_of(weight), matmul.parts_of(tokens, rows)
    chosen = form(rows, columns, tokens, matmul.machine_of(x.device), matmul.STORED[kind]) if parts else None
    if chosen is None:
        return quantize_rows(matmul.group_products(x, weight), fmt)
    need(data, "weight", shape=(None, columns), device=x.device, align=16)
    made, (to, to_scale, *_) = stored_rows(tokens, rows, fmt, None, x.device)
    flat = matmul.aligned(x.flatten(1))
    given = (tensor_map(data, _ROWS, 128), scale, flat, flat.stride(0), to, to_scale)
    sizes, grid = (rows, columns, tokens, groups, parts, chosen.stages), rows // _SCALED * parts * chosen.cluster
    _KERNELS[kind](grid, 288, *given, *sizes, smem=chosen.smem, cluster=chosen.cluster, pdl=True)
    return made
