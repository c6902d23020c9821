"""The trainer on a GPU: a recorded step is the step, compiled pieces are the pieces, and a run repeats to the bit."""

from __future__ import annotations

import os
from collections.abc import Collection

import pytest
import torch

from tests.test_training_run import corpus, plan, recipe, words  # noqa: F401  (fixtures)
from training.curves import digest
from training.feed import Maker, Plan, schedule
from training.network import COMPILED
from training.recipes import Recipe
from training.train import Run

pytestmark = pytest.mark.gpu
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as training/train.py: sums in one order, run after run


def trained(recipe: Recipe, plan: Plan, compiled: Collection[str], recorded: bool) -> tuple[Run, list[float]]:  # noqa: F811
    """All steps of the recipe, and the loss of each."""
    run, maker, losses = Run(recipe, "cuda", compiled, recorded), Maker(plan), []
    for phase, name in schedule(recipe):
        found, _ = run.train(phase, maker.block(name, phase.length, phase.long))
        losses.append(float(found["loss"]))
    return run, losses


def test_a_recorded_run_is_the_run_called_step_by_step(recipe: Recipe, plan: Plan) -> None:  # noqa: F811
    called, recorded = (trained(recipe, plan, (), way) for way in (False, True))
    assert recorded[1] == called[1]
    assert digest(recorded[0].params) == digest(called[0].params)


def test_a_run_repeats_to_the_bit(recipe: Recipe, plan: Plan) -> None:  # noqa: F811
    first, second = (trained(recipe, plan, COMPILED, True)[0] for _ in range(2))
    assert digest(first.params) == digest(second.params)


def test_compiled_pieces_pass_on_the_gradients_of_the_pieces(recipe: Recipe, plan: Plan) -> None:  # noqa: F811
    """A loss hardly shows a lost gradient for many steps. Weights that round differently may differ a little."""
    phase, name = next(schedule(recipe))
    block, found = Maker(plan).block(name, phase.length, phase.long), []
    for pieces in ((), COMPILED):
        run = Run(recipe, "cuda", pieces, False)
        run.passes(phase, block)
        found.append({name: p.grad for name, p in run.params.items() if p.grad is not None})
    plain, compiled = found
    assert compiled.keys() == plain.keys()
    matrices = [name for name, gradient in plain.items() if gradient.dim() > 1 and ".hc_" not in name]
    assert len(matrices) > 20
    for name in matrices:
        a, b = plain[name].flatten().double(), compiled[name].flatten().double()
        assert torch.cosine_similarity(a, b, 0) > 0.9, name
        assert 0.8 < b.norm() / a.norm() < 1.25, name


def test_compiled_pieces_compute_what_the_pieces_do(recipe: Recipe, plan: Plan) -> None:  # noqa: F811
    plain, compiled = (trained(recipe, plan, pieces, False)[1] for pieces in ((), COMPILED))
    torch.testing.assert_close(compiled, plain, rtol=0.02, atol=0.02)
