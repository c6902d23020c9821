"""The head on a GPU, the best of its logits, and a token of them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.matmul import product, refuse_product
from dsv4.ops.sample import Choice, Sampled, head, sample

_PART: Final = 2048  # keys of a block, csrc/best.cu
MOST: Final = 32  # that are picked

_FIRST: Final = Kernel("best.cu", "best_first", "p l i i i p p p")
_NEXT: Final = Kernel("best.cu", "best_next", "p p l i i i p p p")

_SAMPLED: Final = 1024  # logits of a block, csrc/sample.cu
_PARTS: Final = Kernel("sample.cu", "sample_parts", "p l i i p p p p p p")
_JOIN: Final = Kernel("sample.cu", "sample_join", "p p p p i p p p")


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


def _refuse_sample(logits: Tensor, temperatures: Tensor, keys: Tensor) -> str | None:
    if not logits.is_cuda:
        return f"the logits are on {logits.device}"
    if logits.dim() != 2 or logits.dtype != torch.float32 or not 0 < logits.shape[1] < 2**31 or logits.stride(1) != 1:
        shown = str(logits.dtype).removeprefix("torch.")
        return f"the logits are {shown} {list(logits.shape)} with stride {list(logits.stride())}"
    return None


@sample.impl("fused", accepts=_refuse_sample)
def _sample(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Sampled:
    (rows, n), device = logits.shape, logits.device
    need(temperatures, "temperatures", shape=(rows,), dtype=torch.float64, device=device)
    need(keys, "keys", shape=(rows,), dtype=torch.int64, device=device)
    parts = -(-n // _SAMPLED)
    types = (torch.float64, torch.int32, torch.int64, torch.int32)
    found = [torch.empty(rows, parts, dtype=dtype, device=device) for dtype in types]
    given = (logits, logits.stride(0), n, parts, temperatures, keys)
    _PARTS(rows * parts, 256, *given, *found, pdl=True)
    made = Sampled(torch.empty_like(keys), torch.empty_like(keys), torch.empty(rows, dtype=torch.bool, device=device))
    _JOIN(rows, 32, *found, parts, *made, pdl=True)
    return made
