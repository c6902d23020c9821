"""Runs of the trainer: fed the same whoever makes the batches, resumed as if never stopped, exported as trained."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv4.config import ModelConfig
from dsv4.engine.request import Sampling
from dsv4.llm import LLM
from tests.test_training_network import CONFIG
from training import feed
from training.curves import Means, cut, digest
from training.export import export_model
from training.feed import FULL, Maker, Plan, blocks, schedule
from training.recipes import RECIPES, Phase, Recipe
from training.train import Run, measured, pace, scaled, train

TEXT = "Once upon a time there was a small fish that lived in a pond. It was happy, and so were its friends. " * 6
MIXTURE = {"wordnet": 1.0, "add": 2.0, "capital": 1.0, "needle": 1.0}


@pytest.fixture(scope="module")
def words(pico_dir: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded tokenizer with the dialect that is trained."""
    folder = tmp_path_factory.mktemp("words")
    for path in (pico_dir / "tokenizer.json", pico_dir / "official_token_ids.json", root / "training/dialect.json"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("build")
    (build / "corpus").mkdir()
    texts = [f"{n}. {TEXT}" for n in range(200)]
    (build / "corpus/wordnet.txt").write_text("\n\x1e\n".join(texts), encoding="utf-8")
    return build


@pytest.fixture
def recipe(pico_dir: Path) -> Recipe:
    size = ModelConfig.load(pico_dir).vocab_size
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"vocab_size": size})
    phases = (Phase(2, 128, False), Phase(1, 128, True), Phase(1, 256, True, long=4))
    return Recipe(config, phases, 1 << 24, MIXTURE, tokens=256, warmup=2)


@pytest.fixture
def plan(recipe: Recipe, words: Path, corpus: Path) -> Plan:
    return Plan.of(recipe, words, corpus)


def run_of(recipe: Recipe) -> Run:
    return Run(recipe, "cpu")


# --- the feed --------------------------------------------------------------------------------------------------------


def test_blocks_come_in_order_and_equal_whoever_makes_them(recipe: Recipe, plan: Plan) -> None:
    wanted = list(schedule(recipe))
    assert len({name for _, name in wanted}) == recipe.steps
    maker = Maker(plan)
    for (phase, name), made in zip(wanted, blocks(plan, wanted, 2, ahead=3), strict=True):
        alone = maker.block(name, phase.length, phase.long)
        assert all(np.array_equal(a, b) for a, b in zip(made, alone, strict=True))
        assert made.ids.shape == (256 // phase.length, phase.length + 2)


def test_answers_count_fully_and_a_prompt_little(plan: Plan) -> None:
    maker = Maker(plan)
    ids, weights, kinds = Maker(replace(plan, tokens=4096)).block("0/0", 512)
    names, controls = maker.names, maker.tokenizer.controls
    assert (weights[kinds == names.index("wordnet")] == FULL).all()
    asked = kinds == names.index("add")
    assert set(weights[asked].tolist()) == {10, FULL}
    assert (weights[asked & (ids == controls["<｜User｜>"])] == 10).all()
    assert FULL in weights[asked & (ids == maker.eos)]


def test_a_long_prompt_counts_no_more_than_a_short_one(plan: Plan) -> None:
    maker = Maker(plan)
    ids = [5] * 6000 + [maker.assistant, 7, 8, maker.eos]
    weights = maker._weights(ids)
    assert weights[-2:] == [FULL, FULL]
    assert sum(weights[:-2]) <= 60 * FULL + len(ids) / 2  # each is rounded


def test_long_rows_hold_more_of_what_fills_them(plan: Plan) -> None:
    maker = Maker(replace(plan, tokens=8192))
    at = maker.names.index("needle")
    plain, more = (maker.block("0/0", 2048, long) for long in (1.0, 6.0))
    assert (more.kinds == at).sum() > 1.5 * (plain.kinds == at).sum()


def test_every_recipe_names_families_and_sources_that_exist() -> None:
    from dsv4.check.tasks.registry import FAMILIES
    from training.sources import SOURCES

    known = {*FAMILIES, *feed.MADE, *(source.name for source in SOURCES)}
    for recipe in RECIPES.values():
        assert set(recipe.mixture) <= known
        assert set(feed.STRETCH) <= set(recipe.mixture)
        assert all(recipe.tokens % phase.length == 0 for phase in recipe.phases)
        assert all(phase.length % 128 == 0 for phase in recipe.phases)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_interrupted_continues_as_if_it_had_not_been(recipe: Recipe, plan: Plan, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    assert train(whole := run_of(recipe), plan, tmp_path / "whole", 1, time.monotonic() + 600)
    out, rounds = tmp_path / "cut", 0
    while True:
        run = run_of(recipe)
        if (out / "state.pt").exists():
            run.load(out / "state.pt")
        rounds += 1
        if train(run, plan, out, 1, deadline=0.0):  # stops behind every step
            break
    assert rounds == recipe.steps
    assert digest(run.params) == digest(whole.params)
    last = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("whole", "cut")]
    assert last[0] == last[1] == {"step": 4, "digest": digest(whole.params)}


@pytest.mark.slow
def test_the_log_tells_each_family_s_loss(recipe: Recipe, plan: Plan, tmp_path: Path) -> None:
    train(run_of(recipe), plan, tmp_path, 1, time.monotonic() + 600)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["step"] == 4
    assert set(line["families"]) == set(MIXTURE)
    assert all(1 < loss < 20 for loss in line["families"].values())


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run(recipe: Recipe, plan: Plan, tmp_path: Path) -> None:
    run = run_of(recipe)
    with torch.no_grad():
        run.params["norm.weight"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 4: the loss is nan"):
        train(run, plan, tmp_path, 1, time.monotonic() + 600)
    assert not (tmp_path / "state.pt").exists()


def test_what_was_trained_is_what_the_engine_loads(recipe: Recipe, plan: Plan, words: Path, tmp_path: Path) -> None:
    run = run_of(recipe)
    maker = Maker(plan)
    for number in range(2):
        run.train(recipe.phases[0], maker.block(f"0/{number}", 128))
    export_model(run.params, recipe, words, tmp_path)
    llm = LLM.load(tmp_path)
    ids = llm.tokenizer.encode_prompt(llm.prompt([{"role": "user", "content": "What is 2 + 2?"}]).pieces)
    assert list(llm.generate(ids, Sampling(temperature=0, max_tokens=3)))
    with pytest.raises(RuntimeError, match="the recipe allows 1000"):
        export_model(run.params, replace(recipe, limit=1000), words, tmp_path)


@pytest.mark.slow
def test_a_recipe_is_measured_and_stretched(recipe: Recipe, plan: Plan) -> None:
    assert 0 < measured(run_of(recipe), Maker(plan)) < 600
    assert [phase.steps for phase in scaled(recipe, 10.0).phases] == [20, 10, 10]
    assert [phase.steps for phase in scaled(recipe, 0.1).phases] == [1, 1, 1]


def test_rates_rise_stay_and_fall() -> None:
    recipe = replace(RECIPES["tiny"], warmup=100, cooldown=0.5)
    paces = [pace(step, recipe) for step in range(recipe.steps)]
    assert paces[0] == 0.01
    assert paces[99] == paces[recipe.steps // 2 - 1] == 1.0
    assert paces == sorted(paces[:100]) + sorted(paces[100:], reverse=True)
    assert 0.0 < paces[-1] <= 0.01 + 1e-9


# --- curves ----------------------------------------------------------------------------------------------------------


def test_means_are_of_the_steps_since_the_last_line() -> None:
    means = Means()
    for loss in (1.0, 3.0):
        means.add({"loss": torch.tensor(loss)}, torch.tensor([[6.0, 0.0], [3.0, 0.0]]))
    assert means.take(["add", "sort"]) == {"loss": 2.0, "families": {"add": 2.0}}
    means.add({"loss": torch.tensor(5.0)}, torch.tensor([[1.0, 8.0], [1.0, 4.0]]))
    assert means.take(["add", "sort"]) == {"loss": 5.0, "families": {"add": 1.0, "sort": 2.0}}


def test_lines_behind_the_state_are_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    cut(log, 3)
    log.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 3, 4)), encoding="utf-8")
    cut(log, 3)
    assert log.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 3}\n'
