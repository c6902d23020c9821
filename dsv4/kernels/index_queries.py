"""The indexer's queries in bytes, on a GPU."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.heads import need_turn
from dsv4.kernels.launch import Kernel, need
from dsv4.ops.index_queries import IndexQueries, index_queries
from dsv4.ops.rope import Rotation
from dsv4.quant.index_keys import DIMS, KEY_LAYOUTS, SCALE_BYTES, KeyLayout

_HEADS: Final = 16  # of a block of threads
_TURNED: Final = 64
_KERNELS: Final = {
    layout: Kernel("index_queries.cu", f"index_queries_{layout.name}", "p l p l i p p i f p p p")
    for layout in KEY_LAYOUTS.values()
}


def _refuse(q: Tensor, turn: Rotation, logits: Tensor, layout: KeyLayout, spread: bool = True) -> str | None:
    if not q.is_cuda:
        return f"q is on {q.device}"
    if q.dtype != torch.bfloat16 or logits.dtype != torch.float32:
        kinds = (str(one.dtype).removeprefix("torch.") for one in (q, logits))
        return "q is {}, logits are {}".format(*kinds)
    if (q.shape[2], turn.cos.shape[-1]) != (DIMS, _TURNED):
        return f"{turn.cos.shape[-1]} of {q.shape[2]} dimensions are rotated: {_TURNED} of {DIMS} fit"
    if q.stride()[1:] != (DIMS, 1) or q.stride(0) % 8 or logits.stride(1) != 1:
        return f"strides are {list(q.stride())} and {list(logits.stride())}"
    return None


@index_queries.impl("fused", accepts=_refuse)
def _index_queries(q: Tensor, turn: Rotation, logits: Tensor, layout: KeyLayout, spread: bool = True) -> IndexQueries:
    (tokens, heads, _), device = q.shape, q.device
    need(q, "q", contiguous=False, align=16)
    need(logits, "logits", shape=(tokens, heads), device=device, contiguous=False)
    need_turn(turn, tokens, device)
    found = IndexQueries(
        torch.empty(tokens, heads, layout.data_bytes, dtype=torch.uint8, device=device),
        torch.empty(tokens, heads, SCALE_BYTES, dtype=torch.uint8, device=device),
        torch.empty(tokens, heads, device=device),
    )
    given = (q, q.stride(0), logits, logits.stride(0), heads, *turn, int(spread), (DIMS * heads) ** -0.5)
    _KERNELS[layout](tokens * -(-heads // _HEADS), 16 * _HEADS, *given, *found, pdl=True)
    return found
