"""The indexer on a GPU: the best candidates of each token, and where they lie."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels import rows
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.mhc_accepts import largest_cluster
from dsv4.ops.index import entry_rows, select_rows

_THREADS: Final = 1024  # of a block, at most; four scores a thread and round
_HELD: Final = (1, 2, 4)  # rounds that a thread keeps
MOST_ROUNDS: Final = 32  # of a block of a team, csrc/select.cu
LISTED: Final = 8192  # places of a team's list
_TEAM_BYTES: Final = 86_800  # of shared memory, csrc/select.cu

_ROWS: Final = Kernel("entry_rows.cu", "entry_rows", "p i p l p i i p")
_ROWS_THREADS: Final = 256
_SIGNATURE: Final = "p l p i i i i i p"
_ALONE: Final = {n: Kernel("select.cu", f"select_alone_{n}", _SIGNATURE) for n in _HELD}
_TEAM: Final = Kernel("select.cu", "select_team", _SIGNATURE)


class Plan(NamedTuple):
    """A launch of select.cu: blocks of a token, threads of a block, and keys that a list holds of a block at most."""

    kernel: Kernel
    blocks: int
    threads: int
    room: int = 0


def plan(tokens: int, width: int, device: torch.device) -> Plan:
    """For the scores of so many candidates. No choice here changes a result."""
    parts = -(-width // (4 * _THREADS))
    if parts <= 1:
        return Plan(_ALONE[1], 1, next(n for n in (256, 512, _THREADS) if 4 * n >= width))
    if parts <= _HELD[-1]:
        return Plan(_ALONE[next(n for n in _HELD if n >= parts)], 1, _THREADS)
    most, blocks = largest_cluster(device), 2
    while blocks < most and (
        blocks * MOST_ROUNDS < parts or (blocks < parts and 2 * blocks * tokens <= rows.multiprocessors(device))
    ):
        blocks *= 2
    return Plan(_TEAM, blocks, _THREADS, LISTED // blocks)


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
    kernel, blocks, threads, room = plan(tokens, width, scores.device)
    ahead = int(tokens * blocks <= rows.multiprocessors(scores.device))  # a wait less, and some bytes more
    given = (scores, scores.stride(0), visible, width, columns, blocks, room, ahead, chosen)
    cluster, smem = (blocks, _TEAM_BYTES) if blocks > 1 else (0, 0)
    kernel(tokens * blocks if columns else 0, threads, *given, smem=smem, cluster=cluster, pdl=True)
    return chosen


def _refuse_rows(entries: Tensor, table: Tensor, slots: Tensor, page: int) -> str | None:
    if not entries.is_cuda:
        return f"the entries are on {entries.device}"
    return None if page > 0 else f"{page} entries a page"


@entry_rows.impl("fused", accepts=_refuse_rows)
def _entry_rows(entries: Tensor, table: Tensor, slots: Tensor, page: int) -> Tensor:
    tokens, count = entries.shape
    for name, x, shape in (("entries", entries, (tokens, count)), ("slots", slots, (tokens,))):
        need(x, name, shape=shape, dtype=torch.int64, device=entries.device)
    need(table, "table", shape=(None, None), dtype=torch.int64, device=entries.device)
    rows = torch.empty_like(entries)
    blocks = -(-tokens * count // _ROWS_THREADS)
    given = (entries, count, table, table.shape[1], slots, page, tokens, rows)
    _ROWS(blocks, _ROWS_THREADS, *given, pdl=True)
    return rows
