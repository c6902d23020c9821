"""The study: the runs that it plans, and what it measures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dsv4.check.study.formats import FORMATS, WHOLE, Run, depths, plan
from dsv4.check.study.measure import Answers
from dsv4.check.study.sample import Passage
from dsv4.check.study.spread import effect, finite
from dsv4.check.study.watch import Sums
from dsv4.errors import ConfigError
from dsv4.quant.rounding import OFFICIAL
from tests.devices import normal

# --- plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_holds_every_format_places_and_depths() -> None:
    runs = plan(61)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) < 45
    assert {*FORMATS, *WHOLE} - {"official"} <= set(names)
    assert {"mxfp4 at experts", "nvfp4-calibrated at attention", "fp4-128 in 32 layers"} <= set(names)
    assert depths(61) == [1, 2, 4, 8, 16, 32]


def test_asked_formats_go_to_the_asked_places() -> None:
    runs = plan(4, ["nvfp4", "float"], ["experts", "kv"], ["nvfp4"])
    assert [run.name for run in runs] == [
        "nvfp4 at experts", "nvfp4 at kv", "float", "nvfp4 at experts in 1 layers", "nvfp4 at experts in 2 layers",
    ]  # fmt: skip


@pytest.mark.parametrize("given", [(["fp5"],), ([], ["heads"]), ([], [], ["float"])])
def test_a_name_that_does_not_exist_lists_those_that_do(given: tuple[list[str], ...]) -> None:
    with pytest.raises(ConfigError, match=r"unknown .*; got .*; wanted .*"):
        plan(4, *given)


def test_a_run_changes_its_places_of_its_layers_alone() -> None:
    changed = Run("mxfp4", "experts", 2).numerics(1, {})
    assert changed.expert_input is not OFFICIAL.expert_input
    assert replace(changed, expert_input=OFFICIAL.expert_input, expert_hidden=OFFICIAL.expert_hidden) == OFFICIAL
    assert Run("mxfp4", "experts", 2).numerics(2, {}) == OFFICIAL
    assert Run("fp8").numerics(0, {}) == OFFICIAL


# --- measures --------------------------------------------------------------------------------------------------------


def test_cosine_and_error_are_their_formulas() -> None:
    x, y = normal("x", 40, 8).double(), normal("y", 40, 8).double()
    sums = Sums()
    for part in range(0, 40, 10):
        sums.add(x[part : part + 10].float(), y[part : part + 10].float())
    found = sums.values()
    assert found["cosine"] == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
    assert found["error"] == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-6)
    assert found["growth"] == pytest.approx(float(y.norm() / x.norm()), rel=1e-6)


def test_a_cosine_near_one_is_not_lost() -> None:
    sums = Sums()
    x = normal("x", 1000)
    sums.add(x, x * (1 + 1e-4 * torch.sign(normal("s", 1000))))
    assert 1 - sums.values()["cosine"] == pytest.approx(0.5e-8, rel=0.2)


@pytest.mark.parametrize(
    ("run", "other", "want"),
    [
        ([2.0, 2.1, 1.9], [1.0, 1.0, 1.0], "worse"),
        ([0.5, 0.5, 0.6], [1.0, 1.0, 1.0], "better"),
        ([2.0, 2.1, 0.9], [1.0, 1.0, 1.0], ""),  # one seed disagrees
        ([1.1, 3.0, 1.2], [1.0, 1.0, 1.0], ""),  # all agree, but they spread as far as they go
        ([11.0, 101.0, 6.0], [10.0, 91.0, 5.5], "worse"),  # the same tenth of very different perplexities
        ([None, 1.0, 1.0], [1.0, 1.0, 1.0], "worse"),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], ""),
        ([1.2], [1.0], "worse"),
    ],
)
def test_an_effect_stands_beyond_the_spread(run: list[float | None], other: list[float | None], want: str) -> None:
    assert effect("perplexity", run, other) == want
    assert effect("score", run[::-1], other[::-1]) in (
        {"worse": "better", "better": "worse", "": ""}[want],
        "worse",
        "",
    )


def test_divergence_agreement_and_exact_answers() -> None:
    """Two tokens to predict over three words, every number by hand."""
    base = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    ours = torch.tensor([[0.25, 0.125, 0.625], [0.1, 0.8, 0.1]]).log()
    answers = Answers()
    answers.add(Passage((2, 0, 1)), ours, base)
    answers.add(Passage((2, 2, 1), 1, "sum"), ours, base)
    answers.add(Passage((2, 0, 1), 1, "sum"), ours, base)
    found = answers.values()
    assert found["kl"] == pytest.approx((0.75 * math.log(2) + 0.25 * math.log(0.4)) / 2)  # one token of two differs
    assert found["text_kl"] == pytest.approx(found["kl"])
    assert found["top1"] == 0.5
    assert found["perplexity"] == pytest.approx((0.25 * 0.8) ** -0.5)
    assert found["exercises"] == {"sum": [1, 2]}
    assert found["score"] == 0.5


def test_logits_that_overflow_have_no_measures() -> None:
    answers = Answers()
    answers.add(Passage((0, 1)), torch.tensor([[float("nan"), 0.0]]), torch.zeros(1, 2))
    found = answers.values()
    assert (found["kl"], found["perplexity"]) == (None, None)
    assert finite({"a": [float("inf"), 1.0]}) == {"a": [None, 1.0]}
