"""The bytes that a decode step must read, held against figures that were counted by hand and by another program."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.reads import Point, Reads, row_reads, step_bytes, touched_experts
from dsv4.config import ModelConfig

FLASH = ModelConfig.named("flash")
PARAMS = tuple(parameters(FLASH))
READS = Reads.of(PARAMS)


@pytest.mark.parametrize(("tokens", "wanted"), [(1, 6), (8, 44), (32, 136), (64, 200), (128, 244)])
def test_experts_that_tokens_choose(tokens: int, wanted: int) -> None:
    assert touched_experts(FLASH, tokens) == pytest.approx(wanted, abs=0.5)


@pytest.mark.parametrize(("layer", "megabytes"), [(1, 217.6), (3, 226.0), (4, 247.5)])
def test_weights_of_a_layer_for_one_token(layer: int, megabytes: float) -> None:
    """Of a window alone (its experts chosen by a table, of which one row is read), of ratio 128 and of ratio 4."""
    own = [param for param in PARAMS if param.name.startswith(f"layers.{layer}.")]
    assert Reads.of(own).step(FLASH, 6, 1) / 1e6 == pytest.approx(megabytes, abs=0.5)


@pytest.mark.parametrize(
    ("ratio", "context", "wanted"),
    [
        (0, 100, 100 * 584),
        (0, 8192, 128 * 584),
        (4, 2048, (128 + 512) * 584),
        (4, 2052, (128 + 512) * 584 + 513 * 68),
        (128, 8192, (128 + 64) * 584),
    ],
)
def test_rows_that_a_token_reads(ratio: int, context: int, wanted: int) -> None:
    assert row_reads(FLASH, ratio, context) == wanted


@pytest.mark.parametrize(("sequences", "milliseconds"), [(1, 2.49), (8, 7.4), (32, 19.1), (64, 27.3), (128, 32.9)])
def test_a_step_of_flash_on_an_h200(sequences: int, milliseconds: float) -> None:
    """Beside figures from sizes of layers alone, at 4.51 TB/s and without the caches."""
    seconds = step_bytes(FLASH, READS, Point(sequences, 1)) / 4.51e12
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.02)


def test_every_sequence_reads_rows_of_its_own() -> None:
    per_layer = sum(row_reads(FLASH, ratio, 8192) for ratio in FLASH.layer_ratios)
    short = step_bytes(FLASH, READS, Point(3, 0))
    assert step_bytes(FLASH, READS, Point(3, 8192)) - short == pytest.approx(3 * per_layer)


def test_with_all_experts_in_use_a_step_reads_every_byte_but_of_tables() -> None:
    """No draft, one row of the embedding, a row of the table of each hash layer."""
    all_used = replace(FLASH, num_experts_per_tok=FLASH.n_routed_experts)
    main = [param for param in PARAMS if not param.name.startswith("mtp.")]
    tables = [param for param in main if param.name.endswith(("tid2eid", "embed.weight"))]
    looked_up = 2 * FLASH.hidden_size + 3 * 8 * FLASH.num_experts_per_tok
    wanted = sum(param.nbytes for param in main) - sum(param.nbytes for param in tables) + looked_up
    assert step_bytes(all_used, READS, Point(1, 0)) == pytest.approx(wanted, rel=1e-12)
