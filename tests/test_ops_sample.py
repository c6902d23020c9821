"""Choosing a token: greedy and by filters, against distributions worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4.ops.sample import biased, probabilities, sample
from tests.devices import DEVICES, normal

# Token 2 has 1/2, 0 has 1/4, 3 has 1/8, 1 and 4 have 1/16 each.
LOGITS = torch.log(torch.tensor([4.0, 1, 8, 2, 1]))
JUST_UNDER_ONE = math.nextafter(1.0, 0.0)


@DEVICES
def test_greedy_takes_the_largest_and_of_equals_the_lowest(device: str) -> None:
    for row, wanted in (([0.0, 2, 1], 1), ([3.0, 1, 3, 3], 0), ([1.0, 1, 1], 0), ([-5.0, -2, -2], 1)):
        for u in (0.0, 0.5, JUST_UNDER_ONE):
            assert sample(torch.tensor(row, device=device), u, 0.0) == wanted


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, {2: 8, 0: 4, 3: 2, 1: 1, 4: 1}),
        ({"top_k": 1}, {2: 8}),
        ({"top_k": 3}, {2: 8, 0: 4, 3: 2}),
        ({"top_k": 4}, {2: 8, 0: 4, 3: 2, 1: 1}),  # of the two last equals the lower id
        ({"top_k": 99}, {2: 8, 0: 4, 3: 2, 1: 1, 4: 1}),
        ({"top_p": 0.49}, {2: 8}),
        ({"top_p": 0.51}, {2: 8, 0: 4}),  # the one that crosses the mass stays
        ({"top_p": 0.76}, {2: 8, 0: 4, 3: 2}),
        ({"top_p": 0.0}, {2: 8}),
        ({"min_p": 0.24}, {2: 8, 0: 4, 3: 2}),  # 2/8 is just above
        ({"min_p": 0.26}, {2: 8, 0: 4}),
        ({"min_p": 1.0}, {2: 8}),
        ({"top_k": 2, "top_p": 0.6}, {2: 8}),  # top_p counts the mass that top_k left: 8/12 reaches 0.6
        ({"top_k": 2, "top_p": 0.7}, {2: 8, 0: 4}),
        ({"min_p": 0.2, "top_p": 0.58}, {2: 8, 0: 4}),  # 8/14 does not
        ({"min_p": 0.2, "top_p": 0.56}, {2: 8}),
    ],
)
@DEVICES
def test_filters_keep_what_they_should(filters: dict[str, float], kept: dict[int, int], device: str) -> None:
    asked = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    probs, ids = probabilities(LOGITS.to(device), **asked)
    assert ids.tolist() == list(kept)
    assert probs.tolist() == pytest.approx([share / sum(kept.values()) for share in kept.values()])


@pytest.mark.parametrize(("temperature", "power"), [(0.5, 2), (1.0, 1), (2.0, 0.5)])
def test_temperature_is_a_power_of_the_probabilities(temperature: float, power: float) -> None:
    probs, ids = probabilities(LOGITS, temperature, 0, 1.0, 0.0)
    weights = [w**power for w in (8, 4, 2, 1, 1)]
    assert ids.tolist() == [2, 0, 3, 1, 4]
    assert probs.tolist() == pytest.approx([w / sum(weights) for w in weights])


@DEVICES
def test_u_picks_by_cumulative_mass(device: str) -> None:
    """Token n is taken for u in [mass before it, mass with it): 0 gives the most, almost 1 the least probable."""
    logits = LOGITS.to(device)
    for u, wanted in (
        (0.0, 2),
        (0.499, 2),
        (0.501, 0),
        (0.749, 0),
        (0.751, 3),
        (0.876, 1),
        (0.938, 4),
        (JUST_UNDER_ONE, 4),
    ):
        assert sample(logits, u, 1.0) == wanted


def test_shares_of_many_draws_follow_the_probabilities() -> None:
    counts = [0] * 5
    for n in range(1600):
        counts[sample(LOGITS, (n + 0.5) / 1600, 1.0)] += 1
    assert counts == [400, 100, 800, 200, 100]


@given(st.floats(0, JUST_UNDER_ONE), st.integers(0, 10), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 100))
def test_a_token_is_always_found_and_among_the_kept(
    u: float, k: int, p: float, least: float, temperature: float
) -> None:
    logits = normal("logits", 50, size=4)
    probs, ids = probabilities(logits, temperature, k, p, least)
    assert float(probs.sum()) == pytest.approx(1)
    assert probs.tolist() == sorted(probs.tolist(), reverse=True)
    assert int(logits.argmax()) == int(ids[0])
    assert not k or len(ids) <= k
    assert sample(logits, u, temperature, k, p, least) in ids.tolist()


@DEVICES
def test_a_bias_is_added_to_a_copy(device: str) -> None:
    """Rounded once, as FP32 adds; the other logits keep their bits and the given ones theirs."""
    logits = torch.tensor([1.0, 2**24, -3.0], device=device)
    assert biased(logits, [(2, 0.5), (1, 1.0)]).tolist() == [1.0, 2**24, -2.5]  # 2^24 + 1 is a tie, to even
    assert logits.tolist() == [1.0, 2**24, -3.0]
    assert biased(logits, []).tolist() == logits.tolist()


def test_impossible_tokens_are_never_taken() -> None:
    """A logit of minus infinity has no mass, at either end of u."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf])
    assert {sample(logits, u / 1000, 1.0) for u in range(1000)} | {sample(logits, JUST_UNDER_ONE, 1.0)} == {1, 3}


def test_a_low_temperature_does_not_overflow() -> None:
    probs, ids = probabilities(torch.tensor([1e4, -1e4, 9e3]), 0.01, 0, 1.0, 0.0)
    assert probs.tolist() == [1.0, 0.0, 0.0]
    assert ids.tolist() == [0, 2, 1]
