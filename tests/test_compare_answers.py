"""`dsv4 compare --answers`: equal ways answer equally, a near-tie is told from a wrong token, one side can be kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.check.compare import kept
from dsv4.check.compare.answers import BEST, Answer, Token, Work, answer, draw
from dsv4.check.compare.compare import compare
from dsv4.check.compare.parting import Held, hold, parting, spread
from dsv4.check.compare.way import Way, parse
from dsv4.check.evaluate import planned
from dsv4.cli.main import main
from dsv4.errors import RequestError
from dsv4.ops.rope import rope
from tests import PICO

PURE = parse("pure", "cpu")


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(PICO, tuple(one.prompt for one in draw(PICO, 20, 12, 0)), 12, 20)


@pytest.fixture(scope="module")
def ours(work: Work) -> list[Answer]:
    return answer(work, PURE)


@pytest.fixture(scope="module")
def moved(work: Work) -> list[Answer]:
    return answer(work, replace(PURE, shaken=True))


def test_prompts_are_held_out_of_many_families_and_drawn_by_their_seed(work: Work) -> None:
    asked = draw(PICO, 20, 12, 0)
    assert tuple(one.prompt for one in asked) == work.prompts
    assert len({one.row.family for one in asked}) > 10
    assert {one.row for one in asked} <= set(planned([], [1024]))
    assert len(set(work.prompts)) == 20
    assert not {one.prompt for one in draw(PICO, 5, 12, 1)} <= {*work.prompts}


def test_cut_otherwise_and_in_other_company_answers_are_equal(
    work: Work, ours: list[Answer], moved: list[Answer]
) -> None:
    found = hold(ours, moved, answer(work, parse("chunk=61,batch=7", "cpu")))
    assert (found.equal, found.answers, found.partings) == (20, 20, ())
    assert (found.apart.largest, found.right) == (0.0, True)
    assert found.tokens > 150
    assert 0 < found.floor.median < found.floor.largest < 10
    assert all(len(token.best) == BEST and token.id == token.best[0][0] for one in ours for token in one)


@pytest.fixture
def planted() -> Iterator[Way]:
    """Rotations that are wrong for all tokens of a step but its first 30."""

    @rope.impl("planted", accepts=lambda x, turn, inverse=False: None)
    def wrong(x: Tensor, turn: Any, inverse: bool = False) -> Tensor:
        out = rope.reference(x, turn, inverse)
        return torch.cat((out[:30], out[30:] * 1.25))

    yield replace(PURE, choices={"*": "reference", "rope": "planted"})
    del rope.implementations["planted"]


def test_a_planted_bug_is_more_than_rounding(planted: Way, work: Work, ours: list[Answer], moved: list[Answer]) -> None:
    found = hold(ours, moved, answer(work, planted))
    assert found.equal < found.by_rounding
    assert found.all_over
    assert not found.right


# --- by hand ---------------------------------------------------------------------------------------------------------


def told(*tokens: dict[int, float]) -> Answer:
    """An answer, of the logits of each position."""
    ranked = [tuple(sorted(one.items(), key=lambda pair: -pair[1])) for one in tokens]
    return tuple(Token(best[0][0], best) for best in ranked)


HERE = told({5: 4.0, 6: 1.0, 7: 0.0}, {1: 2.0, 2: 1.5, 3: 0.0}, {9: 1.0, 8: 0.0})


def held(b: Answer, moved: Answer = HERE) -> Held:
    return hold([HERE], [moved], [b])


def test_where_and_by_how_much_answers_part() -> None:
    there = told({5: 3.0, 6: 1.0, 7: 0.0}, {2: 2.0, 1: 1.75, 3: 1.5}, {4: 1.0, 8: 0.0})
    found = parting(7, HERE, there)
    assert found == (7, 1, (1, 2), (0.5, 0.25), (0.5, 0.25))
    assert found.moved == 0.375
    third = parting(0, HERE, told({5: 3.0, 6: 1.0}, {3: 2.0, 2: 1.0, 1: -1.0}))
    assert third is not None
    assert (third.margins, third.gaps) == ((0.5, 1.0), (2.0, 3.0))
    unknown = parting(0, HERE, told({5: 3.0, 6: 1.0}, {30: 2.0, 2: 1.0}))
    assert unknown is not None
    assert unknown.gaps == (2.0, 1.0)  # at least: of the last logits that were kept
    assert parting(0, HERE, HERE) is None


def test_only_positions_behind_the_same_tokens_count() -> None:
    there = told({5: 3.0, 6: 1.0, 7: 0.0}, {2: 2.0, 1: 1.75, 3: 1.5}, {9: 100.0, 8: 0.0})
    assert spread([HERE], [there]) == (6, 1.5, 0.375)
    assert math.isnan(spread([()], [()]).largest)


@pytest.mark.parametrize(("far", "right"), [(0.375, True), (0.37, False)])
def test_a_near_tie_is_what_rounding_could_have_turned(far: float, right: bool) -> None:
    """The floor: a logit of a's that moved so far. The planted token's two logits are off by 0.375 on average."""
    there = told({5: 4.0, 6: 1.0, 7: 0.0}, {2: 2.0, 1: 1.75, 3: 0.0}, {9: 1.0, 8: 0.0})
    floor = told({5: 4.0, 6: 1.0, 7: 0.0}, {1: 2.0, 2: 1.5, 3: 0.0}, {9: 1.0 + far, 8: 0.0})
    found = held(there, floor)
    assert (found.equal, found.by_rounding, found.floor.largest) == (0, 1, pytest.approx(far))
    assert [one.prompt for one in found.wrong] == ([] if right else [0])
    assert json.loads(json.dumps(found.as_json()))["partings"][0]["wrong"] is not right


def test_logits_that_differ_everywhere_are_wrong_without_a_wrong_token() -> None:
    def by(far: float) -> Answer:
        return told({5: 4.0 + far, 6: 1.0, 7: 0.0 - far}, {1: 2.0 + far, 2: 1.5, 3: -far}, {9: 1.0 + far, 8: -far})

    assert [held(by(far), by(0.1)).right for far in (0.1, 0.19, 0.21)] == [True, True, False]


# --- kept ------------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_read_again(tmp_path: Path, work: Work, ours: list[Answer]) -> None:
    file = tmp_path / "a.json"
    kept.write(file, kept.Kept("pure", work.digest, ours, ours[::-1]))
    found = kept.read(file, work)
    assert found.words == "pure"
    assert [[token.id for token in one] for one in found.answers] == [[token.id for token in one] for one in ours]
    assert spread(ours, found.answers).largest < 1e-6
    assert [len(one) for one in found.moved] == [len(one) for one in ours[::-1]]
    with pytest.raises(RequestError, match="answers to other prompts"):
        kept.read(file, replace(work, tokens=13))
    for text in ("", "[]", '{"kind": "x"}', '{"kind": "dsv4 answers 1"}'):
        file.write_text(text)
        with pytest.raises(RequestError, match="wanted a file that --record wrote"):
            kept.read(file, work)
    with pytest.raises(RequestError, match="No such file"):
        kept.read(tmp_path / "none", work)


# --- the verb --------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(PICO), *arguments])
    return int(stop.value.code or 0)


def test_one_side_today_and_the_other_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, found = tmp_path / "a.json", tmp_path / "found.json"
    asked = ("--answers", "3", "--tokens", "4")
    assert run(*asked, "--record", str(file)) == 0
    assert "3 answers by pure" in capsys.readouterr().out
    assert run(*asked, "--b", "chunk=9", "--against", str(file), "--json", str(found)) == 0
    out = capsys.readouterr().out
    assert "equal: 3 of 3 answers" in out
    assert "rounding explains all that differs" in out
    tree = json.loads(found.read_text())
    assert (tree["a"], tree["b"], tree["equal"], tree["right"]) == ("pure", "chunk=9", 3, True)
    told = json.loads(file.read_text())
    told["answers"][1][0][0] += 1  # another token, that b cannot say
    told["answers"][1][0][1] = [[told["answers"][1][0][0], 60.0], [1, 0.0]]
    file.write_text(json.dumps(told))
    assert run(*asked, "--b", "chunk=9", "--against", str(file)) == 1
    assert "wrong: 1 answers part" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_share_the_prompts(work: Work, ours: list[Answer]) -> None:
    assert answer(work, PURE, 3) == ours


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--record", "x"), "got no --answers"),
        (("--answers", "2", "--record", "x", "--against", "y"), "wanted none of these"),
        (("--answers", "2", "--layers", "1"), "wanted none of these"),
        (("--answers", "2", "--b", "nvfp4"), "dsv4 study formats"),
        (("--answers", "2", "--against", "nowhere"), "No such file"),
        (("--b", "stored"), "compare --answers N"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_ops_of_stored_layers_are_not_compared() -> None:
    with pytest.raises(RequestError, match="stored layers have other ops"):
        compare(PICO, PURE, replace(PURE, stored=True), None, 40, 1)
