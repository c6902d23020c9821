"""Decode steps in CUDA graphs: which steps are of one shape, and that a graph changes no bit of any answer.

Nor does any other way to come to it, in layers with random weights: small ones on a CPU, the first four of Flash at
their full width on a GPU (17 GB of it). Equal are the hashes of all logits behind every token of the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine import runner as engine_runner
from dsv4.engine.graphs import Graphs, Shape
from dsv4.engine.request import Delta, Sampling
from dsv4.llm import LLM
from dsv4.model.batch import Segment, batch_of, laid_out, make_batch
from dsv4.model.beside import Beside
from tests.slices import Said, Sliced, Unrecorded, Wrong, small

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


# --- random layers: one answer, however it is come to ---------------------------------------------------------------

# Answers end blocks of both ratios, and the longest contexts have more entries than the indexer picks.
SLICES = {
    "small": lambda: Sliced(small(), "cpu", (124, 5, 65), 5),
    "flash": lambda: Sliced(ModelConfig.named("flash").shortened(4), "cuda", (2670, 5, 700, 122), 40),
}


@pytest.fixture(scope="module", params=["small", pytest.param("flash", marks=pytest.mark.gpu)])
def sliced(request: pytest.FixtureRequest) -> Iterator[Sliced]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "small":
            patch.setattr(engine_runner, "Graphs", Unrecorded)
            torch.set_num_threads(1)  # more take longer for what is so narrow
        yield SLICES[request.param]()
    torch.set_num_threads(threads)


def replays(engine: Any) -> int:
    """Graphs that were captured; on a CPU steps that would have been some."""
    graphs = engine._runner._graphs
    return graphs.steps if isinstance(graphs, Unrecorded) else len(graphs._captured)


def tokens_run(engine: Any) -> int:
    return int(engine._runner.tokens)


def same(found: list[Said], sliced: Sliced) -> bool:
    """As the run that does nothing of all this, which has hashes that differ from each other."""
    hashes = [hash for _, hash in sliced.eager]
    return found == sliced.eager and None not in hashes and len({*hashes}) == len(hashes)


def test_random_layers_in_graphs_equal_eager_ones(sliced: Sliced) -> None:
    engine = sliced.engine()
    assert same(sliced.said(engine), sliced)
    assert replays(engine) > 0


def test_random_layers_launched_ahead_equal_those_that_waited(sliced: Sliced) -> None:
    """In graphs whose next ids come from the device, beside prompts in chunks."""
    engine = sliced.engine(ahead=True, prefill_chunk=60)
    assert same(sliced.said(engine), sliced)
    assert replays(engine) > 0


def test_random_layers_alone_equal_a_batch(sliced: Sliced) -> None:
    engine = sliced.engine(max_sequences=1)
    assert same(sliced.said(engine, alone=True), sliced)
    assert replays(engine) > 0


@pytest.mark.parametrize("chunk", [pytest.param(129, marks=pytest.mark.slow), 50])
def test_random_layers_in_chunks_equal_the_whole(chunk: int, sliced: Sliced) -> None:
    """Prompts by so many tokens a step, in steps that decode others as well, in rings that wrap."""
    assert same(sliced.said(sliced.engine(prefill_chunk=chunk)), sliced)


@pytest.mark.parametrize("points", [pytest.param(0, marks=pytest.mark.slow), 16])
def test_random_layers_turned_out_equal_those_that_were_not(points: int, sliced: Sliced) -> None:
    """One slot for all, with turns of few steps: states that were kept, or every token once more."""
    room = len(sliced.lengths) * sliced.options.max_context
    engine = sliced.engine(max_sequences=1, turn=3, reuse_points=points, cache_tokens=room)
    assert same(sliced.said(engine), sliced)
    assert engine.preempted > 0
    assert (tokens_run(engine) == sliced.least) == (points > 0)


def test_random_layers_rewound_equal_those_that_were_not(sliced: Sliced) -> None:
    """Every step guesses three tokens, takes back those that are wrong, and writes over them."""
    engine = sliced.engine(drafter=Wrong())
    assert same(sliced.said(engine), sliced)
    assert engine.drafted - engine.confirmed > sliced.answer
    assert replays(engine) > 0
