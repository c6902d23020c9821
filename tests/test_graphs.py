"""Decode steps in CUDA graphs: which steps are of one shape, and that a graph changes no bit of any answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4.config import EngineOptions
from dsv4.engine.graphs import Graphs, Shape
from dsv4.engine.request import Delta, Sampling
from dsv4.llm import LLM
from dsv4.model.batch import Segment, batch_of, laid_out, make_batch
from dsv4.model.beside import Beside

ASKED = ("What is the capital of France?", "Tell me a story.", "What is 12 + 30?", "Which continent is Kenya in?")


def shape(capacity: int, *runs: tuple[int, int]) -> Shape | None:
    """Of a step of sequences from `start` on, `count` tokens each."""
    owner: Any = SimpleNamespace(_store=SimpleNamespace(capacity=capacity))
    return Graphs.shape(owner, [Segment(slot, start, [1] * count) for slot, (start, count) in enumerate(runs)])


@pytest.mark.parametrize(
    ("capacity", "runs", "wanted"),
    [
        (4096, [(0, 1)], Shape(1, 1, 256)),
        (4096, [(255, 1)], Shape(1, 1, 256)),
        (4096, [(256, 1)], Shape(1, 1, 512)),
        (4096, [(10, 3), (1021, 3)], Shape(2, 3, 1024)),
        (4096, [(10, 3), (1022, 3)], Shape(2, 3, 2048)),
        (3000, [(2500, 1)], Shape(1, 1, 3000)),
        (100, [(99, 1)], Shape(1, 1, 100)),
        (4096, [(10, 3), (10, 2)], None),
    ],
)
def test_shapes(capacity: int, runs: Sequence[tuple[int, int]], wanted: Shape | None) -> None:
    assert shape(capacity, *runs) == wanted


def test_a_batch_of_a_graph_is_that_of_the_step() -> None:
    """What the model reads of it; lists may be longer, by entries that are absent."""
    llm = LLM.load()
    model = llm.engine._runner.model
    segments = [Segment(0, 300, [5]), Segment(2, 17, [6])]
    given = torch.tensor(laid_out(segments))
    made, wanted = (
        batch_of(given, 512, 1, {}, model.steps),
        make_batch(segments, model.config.layer_ratios, model.steps),
    )
    for name in ("ids", "positions", "slots", "plain", "yarn"):
        found, right = getattr(made, name), getattr(wanted, name)
        pairs = [(found, right)] if isinstance(found, torch.Tensor) else zip(found, right, strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def test_on_a_cpu_branches_run_where_they_stand() -> None:
    branch, order = Beside(torch.device("cpu"), 0), []
    with branch.run():
        order.append("branch")
        branch.mark()
    order.append("main")
    branch.join()
    assert order == ["branch", "main"]


def answers(llm: LLM, *, together: bool) -> list[tuple[str, str | None]]:
    """Text and hash of all logits of each answer."""
    sampling = Sampling(temperature=0, max_tokens=200)
    asks = [llm.generate(llm.prompt([{"role": "user", "content": text}]), sampling) for text in ASKED]
    found: list[list[Delta]] = [[] for _ in asks]
    for row in side_by_side(asks) if together else one_by_one(asks):
        for number, delta in row:
            found[number].append(delta)
    return [("".join(delta.text for delta in deltas), deltas[-1].hash) for deltas in found]


def side_by_side(asks: Sequence[Iterator[Delta]]) -> Iterator[list[tuple[int, Delta]]]:
    for row in zip_longest(*asks):
        yield [(number, delta) for number, delta in enumerate(row) if delta is not None]


def one_by_one(asks: Sequence[Iterator[Delta]]) -> Iterator[list[tuple[int, Delta]]]:
    for number, ask in enumerate(asks):
        for delta in ask:
            yield [(number, delta)]


@pytest.mark.gpu
@pytest.mark.parametrize("draft", [0, 2])
def test_a_graph_changes_no_bit(draft: int) -> None:
    """Alone and together, the first time and again: the hashes of all logits are those without graphs."""
    said = {}
    for graphs in (False, True):
        options = EngineOptions(
            device="cuda", stored=True, kernels="auto", graphs=graphs, max_sequences=len(ASKED), draft_tokens=draft
        )
        llm = LLM.load(options=options)
        said[graphs] = [answers(llm, together=together) for together in (False, False, True)]
        captured = llm.engine._runner._graphs
        assert (captured is not None and len(captured._captured) > 1) == graphs
    assert said[True] == said[False]
    alone, again, together = said[True]
    assert alone == again == together
