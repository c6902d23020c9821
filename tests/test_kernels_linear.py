"""How FP8 matrices lie on blocks: what decides the bits, and what has to fit."""

from __future__ import annotations

import pytest

from dsv4.check.cases.linear import SHAPES
from dsv4.kernels import linear

WHOLE = 227 << 10  # bytes of shared memory that a block of Hopper can have


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_matrix_of_the_releases_fits(shape: tuple[int, int]) -> None:
    rows, columns = shape
    form = linear.form(rows, columns)
    blocks = columns // 128
    assert form.segments in (1, 2, 4)
    assert blocks // form.segments >= min(blocks, 8)
    assert form.clusters * form.segments <= 2 * linear.MULTIPROCESSORS
    for tokens in (8, 16, 32):
        stages, smem = linear.memory(form, rows, columns, tokens)
        assert 4 <= stages <= 12
        assert smem + 1024 <= WHOLE


def test_segments_follow_from_the_shape_alone() -> None:
    """They are the order of the sums: nothing that differs between two machines or two steps may decide them."""
    assert [linear.form(rows, 8192).segments for rows in (64, 4096, 1 << 17)] == [4, 4, 4]
    assert [linear.form(4096, columns).segments for columns in (128, 1024, 2048, 4096, 8192, 16384)] == [
        1,
        1,
        2,
        4,
        4,
        4,
    ]
