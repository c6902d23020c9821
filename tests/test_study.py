"""The study: its samples, runs, what it concludes from them, and its page."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4.chat.dialect import Dialect
from dsv4.chat.events import Completion
from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.study import formats, plots
from dsv4.check.study.findings import cosine, findings, number, slope, verdict
from dsv4.check.study.formats import FORMATS, Format, plan
from dsv4.check.study.forward import forward, packs
from dsv4.check.study.opening import open_subject
from dsv4.check.study.parallel import side_by_side
from dsv4.check.study.report import page
from dsv4.check.study.results import Results
from dsv4.check.study.sample import Exercises, Passage, Samples, draw_samples
from dsv4.check.study.spread import summarise
from dsv4.check.study.study import Subject, study
from dsv4.check.study.watch import TensorWatch
from dsv4.check.tasks.item import Family, Item
from dsv4.cli.main import main
from dsv4.config import EngineOptions
from dsv4.errors import ConfigError, DSV4Error, RequestError
from dsv4.model.batch import Segment
from dsv4.model.model import Model
from dsv4.quant.rounding import OFFICIAL
from tests.devices import bits
from tests.micro import micro_config, write_micro

# --- samples ---------------------------------------------------------------------------------------------------------

STORIES = [
    f"{name} lived near a {place}. One day {name} saw a {thing} by the hill, and took the {thing} home to keep it safe."
    for name in ("Clara", "Max", "Lily", "Leo", "Alice")
    for place in ("beach", "farm", "market")
    for thing in ("blue tree", "big stone", "small duck")
]


def _sum(random: random.Random, thinking: bool, size: int) -> Item:
    a, b = random.randrange(40), random.randrange(40)
    asked = ({"role": "user", "content": f"What is {a} + {b}?"},)
    return Item("sum", f"{a}+{b}", asked, str(a + b), "Add." if thinking else "", thinking=thinking)


def _shaped(random: random.Random, thinking: bool, size: int) -> Item:
    return replace(_sum(random, thinking, size), response_format={"type": "object"})


def _never(item: Item, completion: Completion) -> bool:
    return False


@pytest.fixture(scope="module")
def exercises(pico_dir: Path) -> Callable[[], Exercises]:
    families = {"sum": Family(_sum, _never), "shaped": Family(_shaped, _never)}
    words = Dialect.for_model(pico_dir), Tokenizer.load(pico_dir)
    return lambda: Exercises(families, *words, 128)


def test_samples_are_disjoint_held_out_and_as_large_as_asked(exercises: Callable[[], Exercises]) -> None:
    samples = draw_samples(STORIES, exercises(), seeds=3, tokens=300, seed=0)
    hands = [*samples.seeds, samples.calibration]
    for hand in hands:
        texts = sum(len(p.ids) for p in hand if not p.family)
        asked = sum(len(p.ids) for p in hand if p.family)
        assert 100 < texts <= 150
        assert 100 < asked <= 150
        assert all(p.ids[0] == exercises().tokenizer.bos_id for p in hand)
    passages = [p for hand in hands for p in hand]
    assert len(set(passages)) == len(passages)


def test_the_same_seed_draws_the_same(exercises: Callable[[], Exercises]) -> None:
    drawn = [draw_samples(STORIES, exercises(), 2, 300, seed).seeds for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_family_that_cannot_be_asked_is_left_out_with_its_reason(exercises: Callable[[], Exercises]) -> None:
    samples = draw_samples(STORIES, exercises(), 1, 300, 0)
    assert {p.family for p in samples.seeds[0]} == {"", "sum"}
    assert list(samples.left_out) == ["shaped"]
    assert "response-format" in samples.left_out["shaped"]


def test_exercises_are_predicted_from_their_answer_on(exercises: Callable[[], Exercises]) -> None:
    made = exercises()
    passage = next(p for p in draw_samples(STORIES, made, 1, 300, 0).seeds[0] if p.family)
    answer = made.tokenizer.decode(passage.ids[passage.start :])
    assert re.fullmatch(r"(Add.</think>)?\d+<｜end▁of▁sentence｜>", answer)


def test_too_little_text_is_refused(exercises: Callable[[], Exercises]) -> None:
    with pytest.raises(RequestError, match="too little held-out text"):
        draw_samples(STORIES[:2], exercises(), 3, 300, 0)


# --- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro(tmp_path_factory.mktemp("micro"), num_hidden_layers=3, compress_ratios=[8, 4, 8, 0])


def random_samples(seeds: int = 3) -> Samples:
    """Ids of the micro model's twelve words; the last passage is longer than a step."""
    dice = random.Random(0)

    def passage(length: int, family: str = "") -> Passage:
        return Passage(tuple(dice.choices(range(12), k=length)), length - 3 if family else 1, family)

    hands = [(passage(9), passage(20), passage(10, "sum"), passage(40)) for _ in range(seeds + 1)]
    return Samples(tuple(hands[1:]), hands[0])


@pytest.fixture(scope="module")
def subject(micro: Path) -> Subject:
    return open_subject(micro, "cpu", span=32)


PLAN = [
    *plan(3, ["fp8", "bf16", "nvfp4-token", "nvfp4-calibrated", "fp4-tensor", "float32"], ["all"], []),
    *plan(3, ["mxfp4"], ["all", "experts", "kv"]),
]


@pytest.fixture(scope="module")
def found(subject: Subject) -> Results:
    return Results(study(subject, random_samples(), PLAN))


def test_passages_side_by_side_give_the_logits_of_each_alone(subject: Subject) -> None:
    pack = packs(random_samples().seeds[0], 32)[0]
    assert len(pack) == 2
    model = subject.model(lambda _: OFFICIAL)
    together = forward(model, subject.store([pack]), pack, 32)
    for passage, logits in zip(pack, together, strict=True):
        alone = model(model.batch([Segment(0, 0, passage.ids)]), subject.store([[passage]])).streams
        assert torch.equal(bits(logits), bits(model.logits(alone)[passage.start - 1 : -1]))


def test_watched_roundings_are_the_same_roundings(subject: Subject) -> None:
    watch, pack = TensorWatch(), list(random_samples().seeds[0][:2])
    looked_at = subject.model(lambda layer: watch.watched(OFFICIAL, layer, idle=True))
    plain = Model(subject.config, subject.weights, subject.options)
    for ours, theirs in zip(
        forward(looked_at, subject.store([pack]), pack, 32),
        forward(plain, subject.store([pack]), pack, 32),
        strict=True,
    ):
        assert torch.equal(bits(ours), bits(theirs))
    assert {place for _, place in watch.peaks()} >= {"kv", "index", "group_output", "latent"}
    taken = watch.take(3)
    assert taken["group_output"]["cosine"] == [1, 1, 1]
    assert all(0.999 < value < 1 for value in taken["expert_hidden"]["cosine"])


@pytest.mark.slow
def test_the_official_numerics_again_change_nothing(found: Results) -> None:
    again = found.runs["fp8"]
    for seed in again["seeds"]:
        assert (seed["kl"], seed["text_kl"], seed["top1"]) == (0, 0, 1)
        assert set(seed["layers"]["streams_error"]) == {0}
        assert set(seed["layers"]["experts_kept"]) == {1}
    assert again["summary"]["perplexity"]["effect"] == ""


def test_every_run_has_every_layer_of_every_seed(found: Results) -> None:
    for run in found.runs.values():
        assert len(run["seeds"]) == 3
        for seed in run["seeds"]:
            if run["depth"]:
                assert "layers" not in seed
                continue
            assert all(len(curve) == 3 for curve in seed["layers"].values())
            assert all(len(row) == 3 for place in seed["tensors"].values() for row in place.values())
    official = found.runs["official"]["seeds"][0]
    assert {"kv", "latent", "shared_hidden"} <= set(official["tensors"])
    assert max(official["layers"]["column_sums"]) < 1e-4
    assert official["layers"]["rms"] == sorted(official["layers"]["rms"]) or min(official["layers"]["rms"]) > 0


def test_coarser_formats_are_farther_away(found: Results) -> None:
    kl = {name: found.mean(name, "kl") or 0.0 for name in found.runs}
    assert 0 < kl["bf16"] < kl["nvfp4-token"] < kl["fp4-tensor"]
    lost = {name: 1 - (found.tensors(name, "cosine")[1] or 0) for name in ("official", "nvfp4-token", "mxfp4")}
    assert 0 < lost["official"] < lost["nvfp4-token"] < lost["mxfp4"]
    assert found.mean("mxfp4 in 1 layers", "text_kl") != found.mean("mxfp4 in 2 layers", "text_kl")


def test_the_same_samples_give_the_same_json(found: Results, subject: Subject) -> None:
    chosen = ["nvfp4-calibrated", "float32"]
    again = Results(study(subject, random_samples(), plan(3, chosen, ["all"], [])))
    for name in chosen:
        assert json.dumps(again.runs[name]["seeds"]) == json.dumps(found.runs[name]["seeds"])


@pytest.mark.slow
def test_processes_find_what_one_finds(found: Results, subject: Subject, micro: Path) -> None:
    again = study(subject, random_samples(), PLAN, through=side_by_side(micro, 2))
    assert json.dumps(again) == json.dumps(found.tree)


def test_progress_counts_every_token(subject: Subject) -> None:
    told: list[tuple[str, int, int]] = []
    study(subject, random_samples(1), plan(3, ["mxfp4"], ["all"]), lambda *step: told.append(step))
    assert [step[1] for step in told] == sorted(step[1] for step in told)
    assert told[-1][1] == told[-1][2]
    assert list(dict.fromkeys(step[0] for step in told)) == [
        "calibration", "official", "mxfp4", "mxfp4 in 1 layers", "mxfp4 in 2 layers",
    ]  # fmt: skip


def test_a_checkpoint_without_quantised_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match="no matrix of this checkpoint is quantised"):
        Subject(micro_config(), {"embed.weight": torch.zeros(1)}, EngineOptions())


# --- what it concludes -----------------------------------------------------------------------------------------------


def tree(**runs: dict[str, list[float]]) -> Results:
    """Results with these seeds for runs of these formats, and nothing below the surface."""
    made = [
        {"name": name, "format": name, "places": "all", "depth": None, "title": name,
         "seeds": [dict(zip(seeds, row, strict=True)) for row in zip(*seeds.values(), strict=True)]}
        for name, seeds in runs.items()
    ]  # fmt: skip
    summarise(made)
    seeds = [{"predicted": 10, "exercises": 2}] * 3
    return Results({"layers": 2, "vocabulary": 100, "samples": {"seeds": seeds, "left_out": {}}, "runs": made})


def seeds(kl: float, perplexity: float, score: float = 0.9) -> dict[str, list[float]]:
    """Three seeds around these numbers."""
    return {
        "kl": [kl * f for f in (0.9, 1, 1.1)], "top1": [1 - kl / 10] * 3, "text_kl": [kl] * 3,
        "perplexity": [perplexity * f for f in (0.5, 1, 2)], "score": [score, score, score + 0.001],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "want"),
    [
        (seeds(2.0, 20.0), "breaks the model"),
        (seeds(0.5, 10.0, 0.6), "breaks the model"),
        (seeds(0.5, 10.3), "costs something that can be measured"),
        (seeds(0.5, 10.0), "moves the predictions, at no cost that stands beyond the spread"),
        (seeds(0.01, 10.0), "cannot be told from the noise of BF16"),
    ],
)
def test_a_verdict_follows_from_the_figures(planted: dict[str, list[float]], want: str) -> None:
    results = tree(official=seeds(0, 10.0), float32=seeds(0.01, 10.0), mxfp4=planted)
    assert verdict(results, "mxfp4") == want


def test_a_study_that_sees_no_harm_says_so() -> None:
    harmless, harmful = seeds(0.5, 10.0), seeds(2.0, 20.0)
    for bad, said in ((harmless, "does not see harm where it must"), (harmful, "can see harm")):
        text = " ".join(findings(tree(official=seeds(0, 10.0), float32=seeds(0.01, 10.0), **{"fp4-128": bad})))
        assert said in text
    assert "silence proves nothing" in " ".join(findings(tree(official=seeds(0, 10.0))))


def test_a_model_that_knows_nothing_is_named_as_such() -> None:
    assert "does not know such text" in " ".join(findings(tree(official=seeds(0, 200.0))))
    assert "does not know such text" not in " ".join(findings(tree(official=seeds(0, 10.0))))


def test_numbers_are_written_for_people() -> None:
    assert [number(x) for x in (0.0, 0.12345, 12.345, 1.2e-5, None)] == [
        "0",
        "0.123",
        "12.3",
        "1.2e-05",
        "no finite number",
    ]
    assert [cosine(x) for x in (0.99968, 0.9951, 0.5, 1.0, None)] == ["0.99968", "0.9951", "0.50", "1.00", "unknown"]
    assert slope([0.1 * n**0.5 for n in range(1, 30)]) == pytest.approx(0.5)


@pytest.fixture
def known(pico_dir: Path) -> tuple[Subject, Samples]:
    """The embedded model, and stories as it tells them."""
    tokenizer = Tokenizer.load(pico_dir)
    exercises = Exercises({}, Dialect.for_model(pico_dir), tokenizer, 64)
    return open_subject(pico_dir, "cpu", 128), draw_samples(STORIES, exercises, 2, 100, 0)


def test_a_planted_harmful_format_is_reported_as_harm(
    known: tuple[Subject, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format that keeps signs alone ruins a model that knows its text; the study must say so."""
    signs = Format("signs", lambda peaks, layer, place: torch.sign)
    monkeypatch.setattr(formats, "FORMATS", {**FORMATS, "fp4-128": signs})
    results = Results(study(*known, plan(4, ["fp4-128", "fp8"], ["all"], [])))
    assert verdict(results, "fp4-128") == "breaks the model"
    assert "can see harm: fp4-128" in " ".join(findings(results))
    assert results.mean("fp8", "kl") == 0


# --- what it shows ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_says_what_was_found(found: Results) -> None:
    pytest.importorskip("matplotlib")
    html = page(found)
    assert html.count("<svg") >= 6
    assert not re.search(r"(?:src|href)=['\"]?http|<script|@import", html)
    for sentence in findings(found):
        assert sentence.split("(")[0].strip() in html.replace("&#x27;", "'")
    assert all(f">{name}<" in html for name in found.runs)


def test_a_picture_of_the_same_numbers_is_the_same_text(found: Results) -> None:
    pytest.importorskip("matplotlib")
    drawn = [plots._figure(found, plots._streams) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith("<svg")


def test_without_matplotlib_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DSV4Error, match=r"matplotlib.*pip install 'dsv4\[report\]'"):
        plots.require()


def test_the_command_writes_table_json_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"source": "s", "text": story}) + "\n" for story in STORIES), encoding="utf-8")
    out, html = tmp_path / "out.json", tmp_path / "out.html"
    sizes = ["--tokens", "128", "--seeds", "2", "--span", "128", "--jobs", "1"]
    asked = [
        "--formats",
        "mxfp4",
        "--places",
        "all",
        "--sweep",
        "",
        "--text",
        str(text),
        "--json",
        str(out),
        "--report",
        str(html),
    ]
    with pytest.raises(SystemExit) as stop:
        main(["study", "formats", *sizes, *asked])
    assert not stop.value.code
    printed = capsys.readouterr().out
    tree = json.loads(out.read_text(encoding="utf-8"))
    assert [run["name"] for run in tree["runs"]] == ["official", "mxfp4"]
    assert tree["asked"] == {"seeds": 2, "tokens": 128, "span": 128, "seed": 0}
    assert "mxfp4" in printed
    assert tree["findings"][0].split()[0] == "7"
    assert "<svg" in html.read_text(encoding="utf-8")


@pytest.mark.parametrize("given", [["--formats", "fp5"], ["--tokens", "3"], ["--text", "nowhere.jsonl"]])
def test_a_mistake_is_one_line(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "formats", *given])
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
