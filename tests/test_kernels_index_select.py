"""What the indexer's kernels promise beside the contract: every launch of a row finds the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.check.cases.select import ROWS
from dsv4.kernels import select
from dsv4.kernels.select import Plan, plan
from dsv4.ops.index import select_rows
from tests import shim
from tests.devices import normal

FUSED = select_rows.implementations["fused"].run
CPU = torch.device("cpu")


def plans(width: int) -> list[Plan]:
    """Launches that have room for a row, of blocks of 256 threads: alone, in clusters, and reading again."""
    found = []
    for blocks, kernels in ((1, select._ALONE), (2, select._CLUSTER), (4, select._CLUSTER)):
        found += [Plan(kernel, blocks, 256, n) for n, kernel in kernels.items() if blocks * n * 1024 >= width]
    streamed = [Plan(select._STREAMED, blocks, 256, -(-width // (1024 * blocks))) for blocks in (2, 4)]
    return found + streamed


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
    assert disagreeing(kind, 3000, 512, plans(3000)[::3]) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [3000, 4096])
@pytest.mark.parametrize("kind", ROWS)
def test_all_launches_agree(kind: str, width: int) -> None:
    for k in (129, 1024):
        assert disagreeing(kind, width, k, plans(width)) == []


@pytest.mark.slow
def test_many_rounds_of_a_row_that_is_read_again() -> None:
    """The most that there are, and the same of a row that is not a multiple of anything."""
    for width in (32 * 4 * 1024, 31 * 2 * 1024 - 3):
        blocks = 4 if width % 4 == 0 else 2
        scores = normal("long", 1, width)
        scores[0, ::3] = 2.5
        launch = Plan(select._STREAMED, blocks, 256, select.MOST_ROUNDS)
        visible = torch.tensor([width])
        assert torch.equal(selected(launch, scores, visible, 1024), select_rows.reference(scores, visible, 1024))


@pytest.mark.parametrize("tokens", [1, 2, 64, 8192])
def test_a_plan_has_room_for_every_row(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select.rows, "multiprocessors", lambda device: 132)
    for most in (8, 16):
        monkeypatch.setattr(select, "largest_cluster", lambda device, most=most: most)
        for width in (1, 1024, 1025, 4096, 4097, 16_384, 16_385, 40_000, 65_536, 65_537, 131_073, 262_144, 262_145):
            found = plan(tokens, width, CPU)
            assert 4 * found.threads * found.blocks * found.rounds >= width
            assert 1 <= found.blocks <= most
            assert found.blocks & (found.blocks - 1) == 0
            assert found.rounds <= select.MOST_ROUNDS
            assert (found.blocks > 1) == (found.kernel not in select._ALONE.values())
            assert found.kernel is select._STREAMED or found.kernel.name.endswith(str(found.rounds))


@pytest.mark.slow
def test_a_team_has_no_races() -> None:
    """Every launch under ThreadSanitizer, where threads of all blocks are threads of the host."""
    scores, visible = normal("races", 1, 3000), torch.tensor([2999])
    scores[0, ::5] = 0.5
    for launch in plans(3000):
        with pytest.MonkeyPatch.context() as patch, shim.machine(threads=True):
            patch.setattr(select, "plan", lambda *given, launch=launch: launch)
            assert torch.equal(FUSED(scores, visible, 700), select_rows.reference(scores, visible, 700))
