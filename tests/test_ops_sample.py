"""Choosing a token: greedy, by noise and by filters, against distributions worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4.ops.sample import GAMMA, biased, filtered, key_of, mixed, noise, sample
from tests.devices import DEVICES, normal

# Token 2 has 1/2, 0 has 1/4, 3 has 1/8, 1 and 4 have 1/16 each.
LOGITS = torch.log(torch.tensor([4.0, 1, 8, 2, 1]))


def drawn(logits: Tensor, temperature: float, count: int = 1, seed: int = 0) -> Tensor:
    """Tokens of `count` positions of a request, all with these logits [V]."""
    temperatures = torch.full((count,), temperature, dtype=torch.float64, device=logits.device)
    keys = torch.tensor([key_of(seed, n) for n in range(count)], device=logits.device)
    return sample(logits.expand(count, -1), temperatures, keys).tokens


def kept(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    """Tokens of a row that filters leave."""
    shares = (torch.tensor([one], dtype=torch.float64, device=logits.device) for one in (top_p, min_p))
    warm = torch.tensor([temperature], dtype=torch.float64, device=logits.device)
    left = filtered(logits[None], warm, torch.tensor([top_k], device=logits.device), *shares)[0]
    ids = (left > -math.inf).nonzero().flatten()
    assert torch.equal(left[ids], logits[ids])
    return ids.tolist()


@DEVICES
def test_greedy_takes_the_largest_and_of_equals_the_lowest(device: str) -> None:
    for row, wanted in (([0.0, 2, 1], 1), ([3.0, 1, 3, 3], 0), ([1.0, 1, 1], 0), ([-5.0, -2, -2], 1)):
        assert drawn(torch.tensor(row, device=device), 0.0, 5).tolist() == [wanted] * 5


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [2]),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_k": 4}, [0, 1, 2, 3]),  # of the two last equals the lower id
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.49}, [2]),
        ({"top_p": 0.51}, [0, 2]),  # the one that crosses the mass stays
        ({"top_p": 0.76}, [0, 2, 3]),
        ({"top_p": 0.0}, [2]),
        ({"min_p": 0.24}, [0, 2, 3]),  # 2/8 is just above
        ({"min_p": 0.26}, [0, 2]),
        ({"min_p": 1.0}, [2]),
        ({"top_k": 2, "top_p": 0.6}, [2]),  # top_p counts the mass that top_k left: 8/12 reaches 0.6
        ({"top_k": 2, "top_p": 0.7}, [0, 2]),
        ({"min_p": 0.2, "top_p": 0.58}, [0, 2]),  # 8/14 does not
        ({"min_p": 0.2, "top_p": 0.56}, [2]),
        ({"top_p": 0.74, "temperature": 0.5}, [2]),  # 64 of 86
        ({"top_p": 0.75, "temperature": 0.5}, [0, 2]),
        ({"min_p": 0.2, "temperature": 2.0}, [0, 1, 2, 3, 4]),  # the square root of 1/8
    ],
)
@DEVICES
def test_filters_keep_what_they_should(filters: dict[str, float], wanted: list[int], device: str) -> None:
    assert kept(LOGITS.to(device), **filters) == wanted  # type: ignore[arg-type]


def test_rows_are_filtered_by_what_is_asked_of_each() -> None:
    rows, wide = LOGITS.expand(3, -1), torch.float64
    left = filtered(
        rows, torch.ones(3, dtype=wide), torch.tensor([0, 2, 0]), *torch.tensor([[1, 1, 0.6], [0, 0, 0.3]], dtype=wide)
    )
    assert [(row > -math.inf).nonzero().flatten().tolist() for row in left] == [[0, 1, 2, 3, 4], [0, 2], [2]]


@pytest.mark.parametrize(("temperature", "power"), [(0.5, 2), (1.0, 1), (2.0, 0.5)])
def test_shares_of_many_draws_are_powers_of_the_probabilities(temperature: float, power: float) -> None:
    """Within five standard deviations: the keys are always the same ones."""
    count = 40_000
    shares = drawn(LOGITS, temperature, count).bincount(minlength=5) / count
    weights = torch.tensor([4.0, 1, 8, 2, 1]) ** power
    probs = weights / weights.sum()
    assert ((shares - probs).abs() < 5 * (probs * (1 - probs) / count).sqrt()).all()


def test_neighbours_in_seed_and_position_have_nothing_in_common() -> None:
    """Pairs of draws of equal tokens are as many as those of two dice."""
    flat, count = torch.zeros(5), 20_000
    first = drawn(flat, 1.0, count + 1)
    for other in (
        first[1:],
        drawn(flat, 1.0, count, seed=1),
        drawn(flat, 1.0, count, seed=-1),
        drawn(flat, 1.0, count, 2**64 - 2),
    ):
        equal = int((first[:count] == other[:count]).sum())
        assert abs(equal - count / 5) < 5 * math.sqrt(count * 0.2 * 0.8)


@DEVICES
def test_the_generator_is_splitmix64(device: str) -> None:
    """Its first numbers from 1234567, as they are known."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = [(1234567 + (n + 1) * GAMMA + 2**63) % 2**64 - 2**63 for n in range(5)]
    assert [n % 2**64 for n in mixed(torch.tensor(states, device=device)).tolist()] == wanted


def test_noise_is_gumbels() -> None:
    """Mean, variance, and how often it is below a few numbers: exp(-exp(-x))."""
    found = noise(torch.tensor([key_of(3, n) for n in range(20)]), 5000).flatten()
    assert float(found.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(found.var()) == pytest.approx(math.pi**2 / 6, abs=0.04)
    for x in (-1.5, 0.0, 2.0, 6.0):
        assert float((found < x).double().mean()) == pytest.approx(math.exp(-math.exp(-x)), abs=0.008)


@given(st.integers(0, 2**63), st.integers(0, 10), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 100))
def test_a_token_is_always_found_and_among_the_kept(
    seed: int, k: int, p: float, least: float, temperature: float
) -> None:
    logits = normal("logits", 50, size=4)
    ids = kept(logits, temperature, k, p, least)
    assert int(logits.argmax()) in ids
    assert not k or len(ids) <= k
    left = torch.full_like(logits, -math.inf).index_copy(0, torch.tensor(ids), logits[ids])
    assert int(drawn(left, temperature, 1, seed)) in ids


@DEVICES
def test_a_bias_is_added_to_a_copy(device: str) -> None:
    """Rounded once, as FP32 adds; the other logits keep their bits and the given ones theirs."""
    logits = torch.tensor([1.0, 2**24, -3.0], device=device)
    assert biased(logits, [(2, 0.5), (1, 1.0)]).tolist() == [1.0, 2**24, -2.5]  # 2^24 + 1 is a tie, to even
    assert logits.tolist() == [1.0, 2**24, -3.0]
    assert biased(logits, []).tolist() == logits.tolist()


def test_impossible_tokens_are_never_taken() -> None:
    """A logit of minus infinity has no mass."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf])
    for temperature in (0.01, 1.0, 100.0):
        assert set(drawn(logits, temperature, 1000).tolist()) <= {1, 3}
    assert set(drawn(logits, 1.0, 1000).tolist()) == {1, 3}


@pytest.mark.parametrize("temperature", [0.01, 1e-30, 5e-324])
def test_a_low_temperature_does_not_overflow(temperature: float) -> None:
    logits = torch.tensor([1e4, -1e4, 3e38, 9e3])
    assert drawn(logits, temperature, 50).tolist() == [2] * 50
    assert kept(logits, temperature, top_p=0.9) == [2]


def test_a_mark_sees_every_bit_of_every_logit() -> None:
    """The order of adding is of no account, and rows that are not finite are said to be so."""
    logits = normal("logits", 64, 300)
    rows = logits.clone()
    rows.view(torch.int32)[torch.arange(64), torch.arange(64) * 4] ^= 1 << (torch.arange(64) % 31)
    given = torch.ones(64, dtype=torch.float64), torch.arange(64)
    before, after = (sample(one, *given) for one in (logits, rows))
    assert (before.marks != after.marks).all()
    assert torch.equal(before.finite, torch.ones(64, dtype=torch.bool))
    assert torch.equal(
        sample(logits.index_fill(1, torch.tensor([7]), math.nan), *given).finite, torch.zeros(64, dtype=torch.bool)
    )
