"""Going on from what an earlier request left. Every "=" is bitwise, in `official` numerics on the CPU.

Caches start as NaN, states that are kept included: what is read without having been written shows at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dsv4.cache.store import LayerStore, LiveRows, Store
from dsv4.chat.replay import replay
from dsv4.config import EngineOptions
from dsv4.engine.request import Delta, Request, Sampling
from dsv4.engine.scheduler import Scheduler, Work
from dsv4.errors import NumericsError
from dsv4.llm import LLM
from dsv4.model.batch import Unread
from tests.exact import LENGTHS, PROMPT, Rig, different_state, poisoned, same

ASKED = Sampling(seed=3, max_tokens=6, trace=6)


@pytest.fixture(scope="session")
def pico(pico_dir: Path) -> Rig:
    """The embedded model and a prompt of 300 tokens."""
    return Rig.open(pico_dir)


# --- one prefix, two sequences ---------------------------------------------------------------------------------------


def _gone_on(rig: Rig, length: int, end: int = PROMPT, before: int = 0, chunk: int = 512) -> None:
    """Slot 2 goes on from the first `length` tokens of slot 0, which ran `before` more, and then is overwritten."""
    store = rig.store(points=2, prefill_chunk=chunk)
    head = min(length + before, PROMPT)
    rig.pieces(store, [*range(chunk, head, chunk), head])
    store.keep(1, 0, length)
    full = length // store.page
    store.reset(2, length)
    store.assign(2, [*store.pages[0][:full], *store.pages[2][full:]])
    store.restore(1, 2, length)
    first = min(length + min(9, chunk), end)
    for stop in [first, *range(first + chunk, end, chunk), *[end][: end - first]]:
        streams = rig.pieces(store, [stop], slot=2)
        assert same(streams, rig.whole[stop - len(streams) : stop])
        if stop == first:  # the first owner goes on elsewhere
            rig.run(store, (0, rig.random_ids(min(20, chunk), seed=1)))
    if end == PROMPT:
        assert different_state(store, rig.whole_store, len(rig.model.blocks), (2, 0)) == []


@pytest.mark.parametrize("length", [1, 3, 4, 5, 63, 64, 126, 127, 128, 129, 256, 257, 299])
def test_reused_prefix_equals_cold(length: int, pico: Rig) -> None:
    """Streams of all later tokens and the cache: lengths at every residue of 4 and beside every border."""
    _gone_on(pico, length)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_a_reused_prefix_of_every_residue_equals_cold(part: int, pico: Rig) -> None:
    for length in LENGTHS[part::8]:
        _gone_on(pico, length, min(length + 9, PROMPT))


@pytest.mark.parametrize(("length", "before"), [(128, 31), (128, 30), (97, 32), (131, 1)])
def test_a_state_can_be_kept_of_a_place_inside_a_chunk(length: int, before: int, pico: Rig) -> None:
    """In rings of a window and 32, up to as far back as a rewind would reach."""
    _gone_on(pico, length, before=before, chunk=32)


def test_a_state_from_further_back_than_the_rings_reach_is_a_bug(pico: Rig) -> None:
    store = pico.store(points=1, prefill_chunk=32)
    pico.pieces(store, [32, 64, 96, 128, 160])
    with pytest.raises(AssertionError):
        store.keep(0, 0, 127)


# --- requests --------------------------------------------------------------------------------------------------------


def load(pico_dir: Path, **asked: Any) -> LLM:
    """Nothing in its cache is a number."""
    llm = LLM.load(pico_dir, EngineOptions(**({"max_context": 384, "max_sequences": 1} | asked)))
    poisoned(llm.engine._runner.store)
    return llm


class Answer(NamedTuple):
    """All that is the same, however it came about."""

    tokens: list[int]
    traces: list[Any]
    hash: str | None
    finish: str | None


Cold = Callable[..., Answer]


def answer(deltas: Sequence[Delta]) -> Answer:
    assert [delta.hash for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    tokens, traces = [delta.token for delta in deltas], [delta.trace for delta in deltas]
    return Answer(tokens, traces, deltas[-1].hash, deltas[-1].finish)


def asked(llm: LLM, prompt: Sequence[int], sampling: Sampling = ASKED) -> tuple[Answer, int]:
    """The answer, and how much of the prompt did not run."""
    deltas = list(llm.generate(prompt, sampling))
    assert all(delta.cached == 0 for delta in deltas[1:])
    return answer(deltas), deltas[0].cached


def ids(llm: LLM, count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(300, llm.config.vocab_size), k=count)


@pytest.fixture(scope="module")
def cold(pico_dir: Path) -> Cold:
    """Answers of a model that reuses nothing, each found once."""
    llm = load(pico_dir, reuse_points=0)
    found = cache(lambda prompt, sampling: asked(llm, prompt, sampling)[0])
    return lambda prompt, sampling=ASKED: found(tuple(prompt), sampling)


@pytest.mark.parametrize("guesses", [0, 2])
def test_the_second_turn_reads_only_what_is_new(guesses: int, pico_dir: Path, cold: Cold) -> None:
    """Neither the first prompt nor the model's own words run again, but for the last one, which never ran."""
    llm = load(pico_dir, draft_tokens=guesses)
    ran = _counting(llm)
    talk: list[dict[str, Any]] = [{"role": "user", "content": "What is the capital of France?"}]
    first = llm.tokenizer.encode_prompt(llm.prompt(talk, thinking=False).pieces)
    said, cached = asked(llm, first, Sampling(temperature=0, max_tokens=40))
    assert (cached, said.finish) == (0, "stop")
    reply = llm.tokenizer.decode(said.tokens[:-1])
    talk += [{"role": "assistant", "content": reply}, {"role": "user", "content": "Which continent is it in?"}]
    second = replay(llm.prompt(talk, thinking=False).pieces, [said.tokens], llm.tokenizer)
    ran.clear()
    again, cached = asked(llm, second)
    assert cached == len(first) + len(said.tokens) - 1
    assert min(ran) == cached
    assert again == cold(second)


def _counting(llm: LLM) -> list[int]:
    """Fills with the first position of all work."""
    runner, starts = llm.engine._runner, []  # type: ignore[var-annotated]
    real = runner.run

    def run(work: Sequence[Work], unread: Unread | None = None) -> Any:
        starts.extend(item.start for item in work)
        return real(work, unread)

    runner.run = run  # type: ignore[method-assign]
    return starts


@pytest.mark.parametrize(("same_tokens", "cached"), [(130, 0), (300, 256), (257, 256), (256, 256), (255, 0)])
def test_prompts_that_begin_alike_share_full_pages(same_tokens: int, cached: int, pico_dir: Path, cold: Cold) -> None:
    """A prompt of 300 tokens leaves a state at its last full page."""
    llm = load(pico_dir, prefill_chunk=96)
    first = ids(llm, 300, 1)
    asked(llm, first)
    second = [*first[:same_tokens], *ids(llm, 310 - same_tokens, 2)]
    found, reused = asked(llm, second)
    assert reused == cached
    assert found == cold(second)
    assert llm.engine.reused == cached


def test_where_two_prompts_part_a_third_goes_on(pico_dir: Path, cold: Cold) -> None:
    """The second shows that 128 tokens are shared, and leaves a state there."""
    llm = load(pico_dir)
    common = ids(llm, 140, 1)
    for number, cached in enumerate((0, 0, 128)):
        prompt = [*common, *ids(llm, 150, 10 + number)]
        found, reused = asked(llm, prompt)
        assert reused == cached
        assert found == cold(prompt)


def test_no_state_is_found_by_other_ids(pico_dir: Path) -> None:
    """One token differs, first or last: nothing is reused."""
    llm = load(pico_dir, cache_tokens=2048)
    first = ids(llm, 150, 1)
    said, _ = asked(llm, first)
    for place in (0, 127, 149):
        other = [*first, *said.tokens, 400]
        other[place] += 1 if other[place] < 4000 else -1
        assert asked(llm, other)[1] == (128 if place == 149 else 0)
    assert asked(llm, [*first, *said.tokens, 400])[1] == 150 + len(said.tokens) - 1


@pytest.mark.parametrize(
    ("points", "guesses"),
    [
        (0, 2),
        (1, 0),
        (64, 2),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((0, 0), (1, 2), (64, 0))),
    ],
)
def test_turned_out_equals_not(points: int, guesses: int, pico_dir: Path, cold: Cold) -> None:
    """Three requests take turns of two steps in one slot, gone on from a kept state or read again."""
    llm = load(pico_dir, reuse_points=points, turn=2, draft_tokens=guesses, prefill_chunk=48)
    prompts = [ids(llm, count, count) for count in (130, 7, 60)]
    numbers = [llm.engine.add(prompt, ASKED) for prompt in prompts]
    found = deltas_of(llm)
    assert llm.engine.preempted > 2
    for prompt, number in zip(prompts, numbers, strict=True):
        assert answer(found[number]) == cold(prompt)


def test_resumed_equals_uninterrupted(pico_dir: Path, cold: Cold) -> None:
    """On hold in its prompt and in its answer, its slot given to another each time."""
    llm = load(pico_dir, prefill_chunk=100)
    prompt = ids(llm, 250, 1)
    number, found = llm.engine.add(prompt, ASKED), {}  # type: ignore[var-annotated]
    for steps in (1, 3):
        for _ in range(steps):
            for delta in llm.engine.step():
                found.setdefault(delta.number, []).append(delta)
        llm.engine.hold(number, True)
        llm.engine.add(ids(llm, 40, steps), ASKED)
        deltas_of(llm, found)
        llm.engine.hold(number, False)
    assert 0 < len(found[number]) < 6
    assert llm.engine.preempted == 2
    deltas_of(llm, found)
    assert answer(found[number]) == cold(prompt)


def deltas_of(llm: LLM, found: dict[int, list[Delta]] | None = None) -> dict[int, list[Delta]]:
    """Step until nothing can be done."""
    found = {} if found is None else found
    while not llm.engine.stalled:
        for delta in llm.engine.step():
            found.setdefault(delta.number, []).append(delta)
    return found


# --- many at once ----------------------------------------------------------------------------------------------------


def mixed(llm: LLM) -> list[tuple[list[int], Sampling]]:
    """64 requests: short and long, alike and not, greedy and sampled, some with the very words of others."""
    draw, heads = random.Random(9), [ids(llm, count, count) for count in (3, 130, 50)]
    made = []
    for number in range(64):
        head = heads[number % 3]
        prompt = [*head, *ids(llm, draw.randint(1, 12), number // 2)]
        made.append((prompt, Sampling(temperature=number % 4, seed=number // 2, max_tokens=draw.randint(1, 9))))
    return made


class Served(NamedTuple):
    """What 64 requests gave, and what happened on the way."""

    hashes: list[tuple[list[int], str | None]]
    largest: int
    split: int
    preempted: int
    reused: int


def served(pico_dir: Path, order: int, **options: Any) -> Served:
    llm = load(pico_dir, **options)
    runner, sizes, split = llm.engine._runner, [], []  # type: ignore[var-annotated]
    real = runner.run

    def run(work: Sequence[Work], unread: Unread | None = None) -> Any:
        sizes.append(len(work))
        split.extend(item for item in work if not item.sample)
        return real(work, unread)

    runner.run = run  # type: ignore[method-assign]
    requests = mixed(llm)
    places = list(range(64))
    random.Random(order).shuffle(places)
    numbers = {llm.engine.add(*requests[place]): place for place in places}
    found = deltas_of(llm)
    told = {numbers[number]: deltas for number, deltas in found.items()}
    hashes = [([delta.token for delta in told[n]], told[n][-1].hash) for n in range(64)]
    assert llm.engine.pages.in_use == 0
    return Served(hashes, max(sizes), len(split), llm.engine.preempted, llm.engine.reused)


@pytest.mark.slow
def test_64_mixed_requests_in_another_order_give_the_same_bits(pico_dir: Path) -> None:
    """Other company, other chunks, other slots, other turns, less memory: every token and the hash of all logits."""
    one = served(pico_dir, 1, max_sequences=12, prefill_chunk=64, turn=3, cache_tokens=2048)
    other = served(pico_dir, 2, max_sequences=9, prefill_chunk=200, turn=1, cache_tokens=3072, draft_tokens=1)
    assert one.hashes == other.hashes
    assert len({hash for _, hash in one.hashes}) > 40
    for run in (one, other):
        assert run.largest > 8
        assert min(run.split, run.preempted, run.reused) > 0, run[1:]


# --- these tests can fail --------------------------------------------------------------------------------------------


def _without(*names: str) -> Any:
    """States that lack some of the tensors."""
    real = LayerStore.copies

    def copies(self: LayerStore, rows: LiveRows) -> Any:
        lost = [getattr(self, name) for name in names]
        return (copy for copy in real(self, rows) if not any(copy[0] is tensor for tensor in lost))

    return copies


def _short_window(self: LayerStore, rows: LiveRows) -> Any:
    rows.window = rows.window[2:]
    return iter([(self.kv, torch.cat((rows.window, rows.entries)), self.kept_kv)])


def _open_page_shared(self: Store, slot: int, pages: Sequence[int]) -> None:
    self.pages[slot] = list(pages)
    self.table[slot, : len(pages)] = torch.tensor([0, *pages[1:]])


@pytest.mark.parametrize(
    ("where", "planted"),
    [
        ("copies", _without("tail")),
        ("copies", _without("key_tail")),
        ("copies", _without("keys")),
        ("copies", _without("kv")),
        ("copies", _short_window),
    ],
    ids=["tail left out", "index tail left out", "keys of the open page left out", "window left out", "window short"],
)
def test_a_bug_planted_in_what_is_kept_is_caught(
    where: str, planted: Any, pico: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pico.whole_store.mark(0) == PROMPT
    monkeypatch.setattr(LayerStore, where, planted)
    with pytest.raises(AssertionError):
        _gone_on(pico, 263)


def test_a_bug_planted_in_the_table_is_caught(pico: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pico.whole_store.mark(0) == PROMPT
    monkeypatch.setattr(Store, "assign", _open_page_shared)
    with pytest.raises(AssertionError):
        _gone_on(pico, 63)


def test_a_state_that_belongs_to_other_tokens_is_caught(
    pico_dir: Path, cold: Cold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States kept one token too late, under the name of the shorter prefix."""

    def late(self: Scheduler, request: Request, start: int, end: int) -> list[tuple[int, int]]:
        return [(place, length - 1) for place, length in real(self, request, start, end)]

    real = Scheduler.points
    monkeypatch.setattr(Scheduler, "points", late)
    llm = load(pico_dir)
    prompt = ids(llm, 40, 1)
    said, _ = asked(llm, prompt)
    with pytest.raises((AssertionError, NumericsError)):
        assert asked(llm, [*prompt, *said.tokens, 400])[0] == cold([*prompt, *said.tokens, 400])


def test_the_hash_tells_a_single_bit(pico_dir: Path) -> None:
    """One number of one row changed in its last place."""
    llm = load(pico_dir, reuse_points=0, draft_tokens=0)
    prompt = ids(llm, 9, 1)
    before, _ = asked(llm, prompt)
    assert asked(llm, prompt)[0].hash == before.hash

    def nudged(rows: Tensor) -> Tensor:
        rows.view(torch.int32)[:, 17] ^= 1
        return rows

    runner = llm.engine._runner
    real = runner.run
    runner.run = lambda *of: (ran := real(*of))._replace(logits=nudged(ran.logits))  # type: ignore[method-assign]
    after, _ = asked(llm, prompt)
    assert after.tokens == before.tokens
    assert after.hash != before.hash
