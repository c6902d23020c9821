"""The indexer on a GPU: the best candidates of each token."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels import rows
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.mhc_accepts import largest_cluster
from dsv4.ops.index import select_rows

_THREADS: Final = 1024  # of a block; four scores a thread and round
_FEW: Final = 256  # where one round of these has room for all
_HELD: Final = (1, 2, 4)  # rounds that a thread keeps
MOST_ROUNDS: Final = 32  # csrc/select.cu

_SIGNATURE: Final = "p l p i i i i p"
_ALONE: Final = {n: Kernel("select.cu", f"select_alone_{n}", _SIGNATURE) for n in _HELD}
_CLUSTER: Final = {n: Kernel("select.cu", f"select_cluster_{n}", _SIGNATURE) for n in _HELD}
_STREAMED: Final = Kernel("select.cu", "select_streamed", _SIGNATURE)


class Plan(NamedTuple):
    """A launch of select.cu: blocks of a token, threads of a block, and how often those look at four scores each."""

    kernel: Kernel
    blocks: int
    threads: int
    rounds: int


def plan(tokens: int, width: int, device: torch.device) -> Plan:
    """For the scores of so many candidates. No choice here changes a result."""
    if width <= 4 * _FEW:
        return Plan(_ALONE[1], 1, _FEW, 1)
    parts, most = -(-width // (4 * _THREADS)), largest_cluster(device)
    if parts <= _HELD[-1]:
        return Plan(_ALONE[_holding(parts)], 1, _THREADS, _holding(parts))
    if parts > most * _HELD[-1]:
        return Plan(_STREAMED, most, _THREADS, -(-parts // most))
    spread = tokens * min(parts, most) <= rows.multiprocessors(device)
    rounds = _holding(-(-parts // most)) if spread else _HELD[-1]
    blocks = 1 << (-(-parts // rounds) - 1).bit_length()
    return Plan(_CLUSTER[rounds], max(2, blocks), _THREADS, rounds)


def _holding(parts: int) -> int:
    return next(n for n in _HELD if n >= parts)


def _refuse_select(scores: Tensor, visible: Tensor, k: int) -> str | None:
    if not scores.is_cuda:
        return f"the scores are on {scores.device}"
    if scores.dim() != 2 or scores.dtype != torch.float32 or (scores.numel() and scores.stride(1) != 1):
        shown = str(scores.dtype).removeprefix("torch.")
        return f"the scores are {shown} {list(scores.shape)} with stride {list(scores.stride())}"
    most = MOST_ROUNDS * 4 * _THREADS * largest_cluster(scores.device)
    if scores.shape[1] > most:
        return f"{scores.shape[1]} candidates, and {most} fit"
    return None if k > 0 else f"{k} are picked"


@select_rows.impl("fused", accepts=_refuse_select)
def _select_rows(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    tokens, width = scores.shape
    need(visible, "visible", shape=(tokens,), dtype=torch.int64, device=scores.device)
    columns = min(k, width)
    chosen = torch.empty(tokens, columns, dtype=torch.int64, device=scores.device)
    kernel, blocks, threads, rounds = plan(tokens, width, scores.device)
    grid, cluster = tokens * blocks if columns else 0, blocks if blocks > 1 else 0
    given = (scores, scores.stride(0), visible, width, columns, blocks, rounds, chosen)
    kernel(grid, threads, *given, cluster=cluster, pdl=True)
    return chosen
