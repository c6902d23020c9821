"""What the indexer's kernels promise beside the contract: every launch of a row finds the same."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dsv4.check.cases.select import PICKED, ROWS, counts
from dsv4.kernels import select
from dsv4.kernels.select import Plan, plan
from dsv4.ops.index import select_rows
from tests import shim
from tests.devices import normal

FUSED = select_rows.implementations["fused"].run
CPU = torch.device("cpu")


def plans(width: int) -> list[Plan]:
    """Launches that have room for a row: alone, and as teams whose lists have much, little and no room to spare; of few
    threads, so that these find several bounds."""
    found = [Plan(kernel, 1, 256) for n, kernel in select._ALONE.items() if n * 1024 >= width]
    for blocks, threads in ((2, 256), (4, 256), (2, 64), (4, 32)):
        if blocks * threads * 4 * select.MOST_ROUNDS >= width:
            found += [Plan(select._TEAM, blocks, threads, room) for room in (select.LISTED // blocks, 150, 0)]
    return found


def selected(launch: Plan, scores: Tensor, visible: Tensor, k: int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch, shim.machine():
        patch.setattr(select, "plan", lambda *given: launch)
        return FUSED(scores, visible, k)


def disagreeing(kind: str, width: int, k: int, launches: list[Plan]) -> list[Plan]:
    """Launches that pick others of a row of a kind; counts about rounds, blocks and k."""
    visible = torch.tensor([width, width - 1, k + 1, 1025, 2049])
    scores = ROWS[kind](width, k).repeat(len(visible), 1)
    wanted = select_rows.reference(scores, visible, k)
    return [launch for launch in launches if not torch.equal(selected(launch, scores, visible, k), wanted)]


@pytest.mark.parametrize("kind", ROWS)
def test_launches_agree(kind: str) -> None:
    assert disagreeing(kind, 3000, 512, plans(3000)[::2]) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [3000, 4096])
@pytest.mark.parametrize("kind", ROWS)
def test_all_launches_agree(kind: str, width: int) -> None:
    for k in (129, 1024):
        assert disagreeing(kind, width, k, plans(width)) == []


@pytest.mark.slow
@pytest.mark.parametrize("k", PICKED.values())
def test_some_of_all_counts(k: int, seed: int) -> None:
    """Of the case that has 0 to 2100 candidates: no CPU has the patience for each."""
    given = counts(random.Random(seed).sample(range(2101), 200), 2100, k)
    with shim.machine():
        assert torch.equal(FUSED(*given), select_rows.reference(*given))


@pytest.mark.slow
def test_many_rounds() -> None:
    """The most that there are, and the same of a row that is not a multiple of anything: listed, and read again."""
    for width in (32 * 4 * 1024, 31 * 2 * 1024 - 3):
        blocks = 4 if width % 4 == 0 else 2
        for ties in (3, width):
            scores = normal("long", 1, width)
            scores[0, ::ties] = 2.5
            launch = Plan(select._TEAM, blocks, 256, select.LISTED // blocks)
            visible = torch.tensor([width])
            assert torch.equal(selected(launch, scores, visible, 1024), select_rows.reference(scores, visible, 1024))


@pytest.mark.parametrize("tokens", [1, 2, 64, 8192])
def test_a_plan_has_room_for_every_row(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select.rows, "multiprocessors", lambda device: 132)
    for most in (8, 16):
        monkeypatch.setattr(select, "largest_cluster", lambda device, most=most: most)
        for width in (1, 1024, 1025, 4096, 4097, 16_384, 16_385, 40_000, 65_536, 65_537, 262_145, most * 131_072):
            found = plan(tokens, width, CPU)
            team = found.kernel is select._TEAM
            rounds = select.MOST_ROUNDS if team else int(found.kernel.name.rsplit("_")[-1])
            assert 4 * found.threads * found.blocks * rounds >= width
            assert 1 <= found.blocks <= most
            assert found.blocks & (found.blocks - 1) == 0
            assert found.threads in (256, 512, 1024)
            assert (found.blocks > 1) == team
            assert found.room * found.blocks == (select.LISTED if team else 0)


@pytest.mark.slow
def test_a_team_has_no_races() -> None:
    """Every launch under ThreadSanitizer, where threads of all blocks are threads of the host."""
    scores, visible = normal("races", 1, 3000), torch.tensor([2999])
    scores[0, ::5] = 0.5
    for launch in plans(3000):
        with pytest.MonkeyPatch.context() as patch, shim.machine(threads=True):
            patch.setattr(select, "plan", lambda *given, launch=launch: launch)
            assert torch.equal(FUSED(scores, visible, 700), select_rows.reference(scores, visible, 700))
