"""The head on a GPU, and the best of its logits."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel
from dsv4.kernels.matmul import product, refuse_product
from dsv4.ops.sample import Choice, head

_PART: Final = 2048  # keys of a block, csrc/best.cu
MOST: Final = 32  # that are picked

_FIRST: Final = Kernel("best.cu", "best_first", "p l i i i p p p")
_NEXT: Final = Kernel("best.cu", "best_next", "p p l i i i p p p")


def best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of logits [T, V] FP32, the largest first: values [T, k] and ids [T, k] int64."""
    tokens, n = logits.shape
    stride, device = logits.stride(0), logits.device
    values = torch.empty(tokens, k, device=device)
    ids = torch.empty(tokens, k, dtype=torch.int64, device=device)
    before = None
    while True:
        parts = -(-n // _PART)
        found = None if parts == 1 else torch.empty(tokens, parts * k, dtype=torch.int64, device=device)
        sizes, places = (n, k, parts), (found, values, ids)
        if before is None:
            _FIRST(tokens * parts, 256, logits, stride, *sizes, *places, pdl=True)
        else:
            _NEXT(tokens * parts, 256, before, logits, stride, *sizes, *places, pdl=True)
        if found is None:
            return values, ids
        before, n = found, parts * k


def _refuse(x: Tensor, weight: Tensor, k: int) -> str | None:
    if not 0 < k <= MOST:
        return f"{k} are picked, and 1 to {MOST} can be"
    return refuse_product(x, weight)


@head.impl("fused", accepts=_refuse)
def _head(x: Tensor, weight: Tensor, k: int) -> Choice:
    logits = product(x, weight)
    values, ids = best(logits, min(k, weight.shape[0]))
    return Choice(logits, values, ids)
