"""`dsv4 compare`: equal ways are equal, and a planted difference is found where it was planted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.check.compare.compare import Comparison, compare
from dsv4.check.compare.measure import Gap
from dsv4.check.compare.record import shaken
from dsv4.check.compare.way import parse
from dsv4.cli.main import main
from dsv4.errors import KernelError, RequestError
from dsv4.ops.rope import rope
from tests import PICO

TOKENS = 140  # a block of 128 closes, and the indexer selects


def compared(a: str, b: str, tokens: int = TOKENS, layers: int | None = None) -> Comparison:
    return compare(PICO, parse(a, "cpu"), parse(b, "cpu"), None, tokens, layers)


@pytest.fixture(scope="module")
def equal() -> Comparison:
    return compared("pure", "chunk=9,batch=2")


@pytest.mark.slow
def test_cut_anyhow_and_beside_others_every_result_is_equal(equal: Comparison) -> None:
    assert equal.end == {"kl": 0.0, "same_first": 1.0, "bitwise": 1.0}
    assert (equal.first_parted, equal.first_beyond) == (None, None)
    assert not any(gap.differing for gap in equal.gaps)
    assert not any(gap.note for gap in equal.gaps)
    assert {"index_scores", "select_rows"} <= {gap.name for gap in equal.gaps}
    assert sum(gap.elements > 0 for gap in equal.gaps) > 100


def test_results_have_the_names_of_their_weights(equal: Comparison) -> None:
    names = [gap.name for gap in equal.gaps if gap.layer == 1]
    wanted = ("rms_norm attn_norm", "round attn_input", "project attn.wq_a", "project attn.wkv", "mhc_pre hc_attn comb",
              "compressor_terms attn.compressor.project", "select_rows", "moe ffn.shared.w1", "streams")  # fmt: skip
    assert set(wanted) <= set(names)
    assert names[-1] == "streams"
    assert [gap.layer for gap in equal.gaps] == sorted(gap.layer for gap in equal.gaps)


def test_the_floor_is_what_one_last_place_does(equal: Comparison) -> None:
    assert 0 < equal.floor["kl"] < 0.2
    streams = [gap for gap in equal.gaps if gap.name == "streams"]
    assert all(gap.floor and 2.0**-9 < gap.floor < 0.2 for gap in streams)
    x = torch.tensor([1.0, -2.0, 0.0]).bfloat16()
    moved = shaken(x)
    assert moved[2] == 0
    assert ((moved - x).abs()[:2] <= torch.tensor([2.0**-7, 2.0**-6])).all()
    assert (moved != x)[:2].all()


@pytest.mark.parametrize(
    ("b", "name"),
    [
        ("mxfp4@latent", "round latent"),
        ("nvfp4@attn_output", "round attn_output"),
        ("mxfp4@expert_hidden", "moe ffn.shared.w1"),
        ("kv-bf16", "quantize_kv"),
        ("dtype=float32", "mhc_pre hc_attn x"),
    ],
)
def test_a_format_is_found_where_it_rounds(b: str, name: str) -> None:
    found = compared("pure", b, tokens=40)
    assert found.first_parted is not None
    assert (found.first_parted.layer, found.first_parted.name) == (0, name)
    assert found.end["kl"] > 0
    assert found.end["bitwise"] == 0


@pytest.fixture
def planted() -> Iterator[None]:
    """A second implementation of an op that is wrong, for later positions alone."""

    @rope.impl("planted", accepts=lambda x, turn, inverse=False: None)
    def wrong(x: Tensor, turn: Any, inverse: bool = False) -> Tensor:
        out = rope.reference(x, turn, inverse)
        return torch.cat((out[:30], out[30:] * 1.25))

    yield
    del rope.implementations["planted"]


@pytest.mark.usefixtures("planted")
def test_a_planted_bug_is_found_in_its_op() -> None:
    found = compare(PICO, parse("pure", "cpu"), replace(parse("pure", "cpu"), choices={"rope": "planted"}), None, 60, 2)
    assert found.first_beyond is not None
    assert found.first_parted == found.first_beyond
    assert (found.first_beyond.layer, found.first_beyond.name) == (0, "rope 4x64")
    assert found.first_beyond.differing == 30 * 4 * 64
    assert {gap.layer for gap in found.gaps} == {0, 1, 4}


def test_whole_numbers_and_nan_are_held_against_each_other() -> None:
    assert Gap(0, "x", 4, 1).parted
    assert not Gap(0, "x", 4, 1).beyond
    assert Gap(0, "x", 4, 1, 1.0, 0.5, 0.9, 0.01).beyond
    assert not Gap(0, "x", 4, 1, 1.0, 0.03, 0.9, 0.01).beyond
    assert Gap(0, "x", 4, 1, float("nan"), float("nan"), 0.9, 0.01).beyond


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("fast", "no way to run a model; got fast; wanted pure, unfused"),
        ("mxfp4@nowhere", "got mxfp4@nowhere"),
        ("dtype=int8", "got dtype=int8"),
        ("chunk=", "got chunk="),
        ("fused", "got device cpu; wanted cuda"),
    ],
)
def test_what_is_no_way_is_one_line(words: str, why: str) -> None:
    with pytest.raises(RequestError, match=re.escape(why)):
        parse(words, "cpu")


def test_an_implementation_that_does_not_exist_is_named() -> None:
    with pytest.raises(KernelError, match="no such choice for rope"):
        parse("rope=fastest", "cuda")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "found.json", tmp_path / "found.svg"]
    with pytest.raises(SystemExit) as done:
        main(
            [
                "compare",
                "--b",
                "float",
                "--tokens",
                "40",
                "--layers",
                "1",
                "--json",
                str(paths[0]),
                "--plot",
                str(paths[1]),
            ]
        )
    assert not done.value.code
    out = capsys.readouterr().out
    assert "bits part first in layer 0, round attn_input (not in b)" in out
    assert "rms_norm attn_norm" in out
    tree = json.loads(paths[0].read_text(encoding="utf-8"))
    assert tree["first_parted"]["name"] == "round attn_input"
    assert tree["end"]["kl"] > 0
    assert "<svg" in paths[1].read_text(encoding="utf-8")
