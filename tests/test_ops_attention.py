"""Sparse attention with a sink, against a dense softmax in FP64, and the window's positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.ops.attention import sparse_attention, window_positions
from tests.devices import DEVICES, bits, far, normal


def dense(q: Tensor, pool: Tensor, rows: Tensor, sink: Tensor) -> Tensor:
    """The definition in FP64, one token at a time. Rows that are -1 take no part."""
    out = []
    for query, picked in zip(q.double(), rows, strict=True):
        kv = pool[picked[picked >= 0]].double()
        scores = torch.cat((query @ kv.T * q.shape[-1] ** -0.5, sink.double().unsqueeze(1)), 1)
        out.append(torch.softmax(scores, 1)[:, :-1] @ kv)
    return torch.stack(out)


def inputs(tokens: int, heads: int, dim: int, pool: int, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, kv = normal("q", tokens, heads, dim, dtype=dtype, size=2), normal("kv", pool, dim, dtype=dtype)
    rows = torch.stack([torch.randperm(pool, generator=torch.Generator().manual_seed(t))[:n] for t in range(tokens)])
    return q, kv, rows, normal("sink", heads)


def thinned(rows: Tensor, share: float) -> Tensor:
    """Some entries absent, never the first."""
    gone = torch.rand(rows.shape, generator=torch.Generator().manual_seed(5)) < share
    gone[:, 0] = False
    return rows.masked_fill(gone, -1)


@DEVICES
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("entries", [1, 2, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_attention_is_a_dense_softmax(
    entries: int, share: float, dtype: torch.dtype, bound: float, device: str
) -> None:
    """Any number of entries, any of them but the first absent, down to a single one."""
    q, kv, rows, sink = inputs(4, 3, 32, 300, entries, dtype)
    rows = thinned(rows, share)
    found = sparse_attention(*(x.to(device) for x in (q, kv, rows, sink)))
    assert found.dtype == dtype
    assert far(found, dense(q, kv, rows, sink)) < bound


@DEVICES
def test_one_entry_is_weighed_against_the_sink_alone(device: str) -> None:
    q, kv = torch.zeros(1, 3, 8, device=device), torch.ones(5, 8, device=device)
    rows, sink = torch.tensor([[4]], device=device), torch.tensor([0.0, 1000.0, -1000.0], device=device)
    assert sparse_attention(q, kv, rows, sink)[0, :, 0].tolist() == [0.5, 0.0, 1.0]


@DEVICES
def test_a_sink_takes_weight_and_gives_no_value(device: str) -> None:
    q, kv, rows, sink = (x.to(device) for x in inputs(3, 2, 16, 50, 40, torch.float32))
    without = sparse_attention(q, kv, rows, torch.full_like(sink, -1e4))
    scores = torch.einsum("thd,tnd->thn", q, kv[rows]) / 4
    share = torch.exp(torch.logsumexp(scores, -1) - torch.logaddexp(torch.logsumexp(scores, -1), sink))
    assert far(sparse_attention(q, kv, rows, sink), without * share.unsqueeze(-1)) < 1e-5


@DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("entries", [1, 30, 64, 100])
def test_absent_entries_behind_change_no_bit(entries: int, dtype: torch.dtype, device: str) -> None:
    """-1 up to the end of the block, and whole blocks of it."""
    q, kv, rows, sink = (x.to(device) for x in inputs(5, 4, 64, 200, entries, dtype))
    plain = sparse_attention(q, kv, rows, sink)
    for more in (1, 64, 200):
        padded = torch.nn.functional.pad(rows, (0, more), value=-1)
        assert torch.equal(bits(sparse_attention(q, kv, padded, sink)), bits(plain))


@DEVICES
def test_rows_that_nobody_names_may_hold_anything(device: str) -> None:
    """The first row of the pool stands for no absent entry."""
    q, kv, rows, sink = (x.to(device) for x in inputs(5, 4, 64, 200, 100, torch.float32))
    rows = thinned(rows.cpu().clamp(min=1), 0.3).to(device)
    named = torch.zeros(200, dtype=torch.bool, device=device)
    named[rows[rows >= 0]] = True
    poisoned = kv.masked_fill(~named.unsqueeze(1), float("nan"))
    assert torch.equal(sparse_attention(q, poisoned, rows, sink), sparse_attention(q, kv, rows, sink))


@DEVICES
def test_large_scores_neither_overflow_nor_vanish(device: str) -> None:
    """Scores of ±20000, the largest in the last block: the running maximum moves by as much."""
    kv = torch.zeros(130, 4)
    kv[:, 0] = torch.linspace(-1e4, 1e4, 130)
    q, rows = torch.tensor([[[4.0, 0, 0, 0]]]), torch.arange(130).unsqueeze(0)
    found = sparse_attention(q.to(device), kv.to(device), rows.to(device), torch.zeros(1, device=device))
    assert found[0, 0, 0].item() == pytest.approx(1e4)


def test_probabilities_are_rounded_before_the_values_alone() -> None:
    """In BF16 the weights of the values are rounded, their sum is not: both as in the reference kernel."""
    q, kv = torch.ones(1, 1, 1, dtype=torch.bfloat16), torch.tensor([[1.0], [0.99609375]], dtype=torch.bfloat16)
    found = sparse_attention(q, kv, torch.tensor([[0, 1]]), torch.tensor([-1e9]))
    second = torch.exp(torch.tensor(-0.00390625))
    wanted = (1 + second.bfloat16().float() * 0.99609375) / (1 + second)
    assert found.item() == wanted.bfloat16().item()


@DEVICES
def test_the_pool_and_the_rows_stay_as_they_are(device: str) -> None:
    given = [x.to(device) for x in inputs(2, 2, 16, 70, 65, torch.bfloat16)]
    copies = [x.clone() for x in given]
    sparse_attention(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


# --- window ----------------------------------------------------------------------------------------------------------


@DEVICES
@pytest.mark.parametrize("window", [1, 2, 8, 128])
def test_window_positions_are_the_last_ones_oldest_first(window: int, device: str) -> None:
    """Itself and window - 1 before it, those that exist, then -1."""
    positions = [0, 1, 2, 6, 7, 8, 9, 126, 127, 128, 129, 1_000_000]
    for at, found in zip(
        positions, window_positions(torch.tensor(positions, device=device), window).tolist(), strict=True
    ):
        there = list(range(max(0, at - window + 1), at + 1))
        assert found == there + [-1] * (window - len(there))
