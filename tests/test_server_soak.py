"""Hundreds of clients of every kind at once: nothing is lost, nothing is left, and nobody sees another's words."""

from __future__ import annotations

import pytest

from tests.soak import growth, soak


@pytest.mark.slow
def test_a_crowd_of_every_kind(seed: int) -> None:
    """300 of the ten thousand clients that `make soak` sends."""
    found = soak(300, seed)
    assert found["faults"] == []
    assert sum(count for outcomes in found["kinds"].values() for count in outcomes.values()) == 300
    assert found["kinds"]["compared"]["answered"] > 50
    assert found["ended"]["cancelled"] > 0
    assert found["crash"] is None


def test_growth_is_measured_after_the_first_quarter() -> None:
    flat = [(float(n), n, 300.0) for n in range(40)]
    assert growth(flat) == growth([]) == 0
    assert growth([(0.0, 0, 100.0)] * 10 + flat[:30]) == 0
    assert growth([(float(n), n, 300 + n / 4) for n in range(40)]) == 5
