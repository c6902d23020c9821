"""Exact top-k, the choice of compressed rows, index scores and the Hadamard transform."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4.ops.index import head_weights, index_scores, select_rows, top_k
from dsv4.ops.quantize import hadamard, quantize_index, quantize_kv
from dsv4.quant.activation import fp4_simulate, fp8_simulate
from tests.devices import DEVICES, far, normal
from tests.synthetic import u

INF, NAN = math.inf, math.nan
FEW_VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, INF, -INF, NAN, 3.4028234663852886e38, -3.4028234663852886e38])


def ranked(row: list[float]) -> list[int]:
    """Indices, largest first, equal ones by index; NaN counts as minus infinity."""
    return sorted(range(len(row)), key=lambda i: (INF if math.isnan(row[i]) else -row[i], i))


@pytest.mark.parametrize(
    "row",
    [
        [1.0, 3.0, 2.0, 3.0],
        [0.0] * 9,
        [-INF] * 5,
        [NAN] * 4,
        [NAN, -INF, 1.0, NAN, 2.0],
        [-INF, -3.4028234663852886e38, INF, 3.4028234663852886e38],
        [3.4028234663852886e38, INF],
        [0.0, -0.0, 0.0],
    ],
)
@DEVICES
def test_top_k_of_every_count(row: list[float], device: str) -> None:
    """Ties to the lowest index, NaN as minus infinity; k beyond the width gives the width."""
    for k in range(len(row) + 3):
        assert top_k(torch.tensor([row], device=device), k).tolist() == [ranked(row)[:k]]


@given(st.lists(st.lists(FEW_VALUES, min_size=70, max_size=70), min_size=1, max_size=3), st.integers(0, 70))
def test_top_k_of_many_ties(rows: list[list[float]], k: int) -> None:
    assert top_k(torch.tensor(rows), k).tolist() == [ranked(row)[:k] for row in rows]


def chosen(row: list[float], visible: int, k: int) -> list[int]:
    best = sorted(ranked(row[:visible])[:k])
    return best + [-1] * (min(k, len(row)) - len(best))


@DEVICES
def test_select_rows_of_every_count(device: str) -> None:
    """The min(k, visible) best, ascending, then -1: for every number of visible candidates and every k."""
    scores = normal("scores", 65, 64)
    scores[:, ::5] = 0.25  # ties
    for k in (1, 2, 3, 16, 63, 64):
        found = select_rows(scores.to(device), torch.arange(65, device=device), k)
        assert found.tolist() == [chosen(row.tolist(), n, k) for n, row in enumerate(scores)]


@given(st.lists(FEW_VALUES, min_size=1, max_size=12), st.data())
def test_select_rows_whatever_the_scores(row: list[float], data: st.DataObject) -> None:
    """NaN and infinities among the seen ones never let an unseen candidate in, nor push a seen one out."""
    visible, k = data.draw(st.integers(0, len(row))), data.draw(st.integers(1, len(row)))
    assert select_rows(torch.tensor([row]), torch.tensor([visible]), k).tolist() == [chosen(row, visible, k)]


@DEVICES
def test_unseen_candidates_do_not_matter(device: str) -> None:
    scores, visible = normal("scores", 4, 64).to(device), torch.tensor([0, 1, 20, 63], device=device)
    poisoned = scores.masked_fill(torch.arange(64, device=device) >= visible.unsqueeze(1), NAN)
    loud = scores.masked_fill(torch.arange(64, device=device) >= visible.unsqueeze(1), INF)
    assert torch.equal(select_rows(poisoned, visible, 8), select_rows(scores, visible, 8))
    assert torch.equal(select_rows(loud, visible, 8), select_rows(scores, visible, 8))


# --- scores ----------------------------------------------------------------------------------------------------------


def scored(q: Tensor, weights: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """sum over heads of weight * relu(q . k) in FP64."""
    dots = torch.einsum("thd,twd->thw", q.double(), keys[rows].double()).relu()
    return torch.einsum("th,thw->tw", weights.double(), dots)


@DEVICES
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_index_scores_are_their_formula(dtype: torch.dtype, bound: float, device: str) -> None:
    """Over 64 and more candidates per token, of any rows of the pool, with weights of either sign."""
    q, keys = normal("q", 5, 8, 32, dtype=dtype), normal("k", 300, 32, dtype=dtype)
    weights, rows = (
        normal("w", 5, 8, dtype=dtype),
        torch.randint(300, (5, 192), generator=torch.Generator().manual_seed(1)),
    )
    found = index_scores(*(x.to(device) for x in (q, weights, keys, rows)))
    assert found.dtype == torch.float32
    assert far(found, scored(q, weights, keys, rows)) < bound


def test_scores_are_rounded_after_each_step() -> None:
    """Dot products, weighted ones and their sum are BF16: the last bits of the reference's selection."""
    q, keys = (
        torch.full((1, 2, 1), 1.0078125, dtype=torch.bfloat16),
        torch.full((64, 1), 1.0078125, dtype=torch.bfloat16),
    )
    weights = torch.tensor([[1.0, 0.00390625]], dtype=torch.bfloat16)
    found = index_scores(q, weights, keys, torch.arange(64).unsqueeze(0))
    dot = torch.tensor(1.0078125**2).bfloat16()
    wanted = ((dot * weights[0, 0]).float() + (dot * weights[0, 1]).float()).bfloat16().float()
    assert found.unique().tolist() == [wanted.item()]


def test_a_dot_product_below_zero_adds_nothing() -> None:
    q, keys = torch.tensor([[[1.0], [-1.0]]]), torch.full((64, 1), 2.0)
    found = index_scores(q, torch.tensor([[-3.0, 100.0]]), keys, torch.arange(64).unsqueeze(0))
    assert found.unique().tolist() == [-6.0]


def test_head_weights_fold_both_scales_in() -> None:
    x, weight = normal("x", 3, 16), normal("w", 64, 16)
    assert far(head_weights(x, weight, 128), x @ weight.T * 0.011048543456) < 1e-6


# --- Hadamard and the cache's rounding -------------------------------------------------------------------------------


@DEVICES
def test_hadamard_has_the_specified_values(device: str) -> None:
    x = torch.from_numpy(u("had", 128)).bfloat16().float().unsqueeze(0).to(device)
    known = [-0.347191, 0.687987, 0.839667, -0.596322, -0.911335, -0.784598]
    assert hadamard(x)[0, :6].tolist() == pytest.approx(known, abs=1e-6)


def test_hadamard_signs_and_orthonormality() -> None:
    matrix = hadamard(torch.eye(128))
    assert (matrix[3, :8] > 0).tolist() == [True, False, False, True, True, False, False, True]
    assert torch.equal(matrix, matrix.T)
    assert far(matrix @ matrix, torch.eye(128)) < 1e-6
    assert far(hadamard(torch.eye(32)), matrix[:32, :32] * 2) < 1e-6


@DEVICES
def test_index_vectors_are_spread_then_rounded_per_32(device: str) -> None:
    x = normal("x", 3, 2, 128, dtype=torch.bfloat16).to(device)
    assert torch.equal(quantize_index(x), fp4_simulate(hadamard(x), 32))


@DEVICES
def test_keys_keep_their_rotated_dimensions(device: str) -> None:
    """All but the last R dimensions are rounded in blocks of 64, the last one short where the width says so."""
    x = normal("x", 4, 112, dtype=torch.bfloat16, size=3).to(device)
    found = quantize_kv(x, 16)
    assert torch.equal(found[:, 96:], x[:, 96:])
    assert torch.equal(found[:, :64], fp8_simulate(x[:, :64].contiguous(), 64))
    assert torch.equal(found[:, 64:96], fp8_simulate(x[:, 64:96].contiguous(), 64))
    assert not torch.equal(found[:, :64], x[:, :64])
