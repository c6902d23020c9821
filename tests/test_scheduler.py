"""Who runs when: a hundred thousand random steps of the scheduler with its pages. No torch, no model."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from dsv4.cache.pages import Pages
from dsv4.engine.request import Request, Sampling
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.stop import StopText

PAGE, COUNT, LONGEST = 4, 16, 40
TURN = 6


class Silent:
    def push(self, id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def request(number: int, prompt: list[int], output: int) -> Request:
    return Request(number, tuple(prompt), Sampling(max_tokens=output), len(prompt) + output, Silent(), StopText(()))


class Loop:
    """What an engine does with a scheduler, over a model whose next token is a function of those before."""

    def __init__(self, seed: int, slots: int, points: int) -> None:
        self.draw, self.slots, self.count = random.Random(seed), slots, 0
        self.scheduler = Scheduler(slots, 5, Pages(COUNT, PAGE, points), TURN)
        self.points = points
        self.open: dict[int, Request] = {}
        self.written: dict[int, list[int]] = {}  # page → what was last written into it
        self.states: dict[int, list[int]] = {}
        self.seen: Counter[str] = Counter()
        self.queued: dict[int, tuple[int, int]] = {}  # when, and how many were before it
        self.admitted: dict[int, int] = {}
        self.steps = self.longest_turn = self.longest_wait = 0

    # --- what clients do

    def come(self) -> None:
        prompt = [self.draw.choice((7, 7, 7, 8)) for _ in range(self.draw.randint(1, 20))]
        made = request(self.count, prompt, self.draw.randint(1, LONGEST - len(prompt)))
        self.count += 1
        self.open[made.number] = made
        self.scheduler.add(made)
        self._queue(made)

    def leave(self) -> None:
        self._forget(self.draw.choice(list(self.open.values())))

    def hold(self) -> None:
        one = self.draw.choice(list(self.open.values()))
        one.held = not one.held
        self.queued.pop(one.number, None)
        if one in self.scheduler.waiting and not one.held:
            self._queue(one)

    def _forget(self, one: Request) -> None:
        self.scheduler.remove(one)
        del self.open[one.number]
        self.queued.pop(one.number, None)
        self.admitted.pop(one.number, None)

    def _queue(self, one: Request) -> None:
        self.queued[one.number] = (self.steps, self.scheduler.waiting.index(one))

    # --- a step

    def step(self) -> None:
        stalled = self.scheduler.stalled
        for one in self.scheduler.in_the_way():
            assert one.held or self.steps - self.admitted[one.number] >= TURN
            self.seen["held gave way" if one.held else "turned out"] += 1
            if self.points and one.done:
                self._keep(one, [(self.scheduler.keep(one, one.done), one.done)])
            self.scheduler.turn_out(one)
            if not one.held:
                self._queue(one)
        for one in self.scheduler.admit():
            self._admit(one)
        work = self.scheduler.schedule()
        assert bool(work) != stalled
        assert sum(item.end - item.start for item in work if item.end - item.start > 1) <= 5
        for item in work:
            self._run(item.request, item.start, item.end, item.sample)
        self.steps += bool(work)

    def _admit(self, one: Request) -> None:
        assert not one.held
        since, before = self.queued.pop(one.number, (self.steps, 0))
        self.longest_wait = max(self.longest_wait, (self.steps - since) / (before + 1))
        self.admitted[one.number] = self.steps
        assert one.done < one.length
        if one.point is not None:
            state = self.states[one.point]
            assert state == one.tokens(0, one.done)
            if one.done % PAGE:
                self.written[one.pages[one.done // PAGE]] = state[one.done // PAGE * PAGE :]
            self.seen["went on"] += 1
            self.seen["went on after a turn"] += bool(one.output)
        else:
            assert one.done == 0
            self.seen["read again"] += bool(one.output)
        self._check(one)

    def _run(self, one: Request, start: int, end: int, sample: bool) -> None:
        assert start == one.done
        self._check(one)
        for first in range(start // PAGE * PAGE, end, PAGE):
            self.written[one.pages[first // PAGE]] = one.tokens(first, min(first + PAGE, end))
        one.done = end
        if start <= one.reached < end:  # further than ever before
            self.longest_turn = max(self.longest_turn, self.steps - self.admitted[one.number] + 1)
        if sample:
            one.output.append(7 + (sum(one.tokens(0, end)) % 5 == 0))
            if len(one.output) == one.sampling.max_tokens or self.draw.random() < 0.02:
                one.finish = "length"
        if self.points:
            before = list(one.pages)
            self.scheduler.share(one, end)
            self.seen["twins"] += one.pages != before
            self._keep(one, self.scheduler.points(one, start, end))
        if one.finish:
            self.seen["ended"] += 1
            self._forget(one)

    def _keep(self, one: Request, places: list[Any]) -> None:
        for place, length in places:
            if place is not None:
                self.states[place] = one.tokens(0, length)

    def _check(self, one: Request) -> None:
        """All that it has done lies in its pages, as it left it."""
        for first in range(0, one.done, PAGE):
            held = self.written[one.pages[first // PAGE]]
            assert held[: one.done - first] == one.tokens(first, min(first + PAGE, one.done))

    def check(self) -> None:
        running, pages = self.scheduler.running, self.scheduler.pages
        assert len({one.slot for one in running}) == len(running) <= self.slots
        users = Counter(page for one in running for page in one.pages)
        assert [users[page] for page in range(COUNT)] == pages._users
        for page, count in users.items():  # shared pages are full, and known by their tokens
            assert count == 1 or all(one.pages.index(page) < one.shared for one in running if page in one.pages)
        assert sorted([*pages._free, *pages._idle, *users]) == list(range(COUNT))
        assert pages._promised == sum(-(-one.limit // PAGE) - len(one.pages) for one in running)
        assert pages.room() >= 0
        assert sorted(self.open) == sorted(r.number for r in (*running, *self.scheduler.waiting))


def served(seed: int, slots: int, points: int, steps: int) -> Loop:
    loop = Loop(seed, slots, points)
    busy = max(3, 2 * slots)
    for number in range(steps):
        if loop.draw.random() < 0.2 and len(loop.open) < busy:
            loop.come()
        if loop.open and loop.draw.random() < 0.01:
            loop.leave()
        if loop.open and loop.draw.random() < 0.02:
            loop.hold()
        loop.step()
        if number % 10 == 0:
            loop.check()
    for one in loop.open.values():
        one.held = False
    for _ in range(10_000):
        if not loop.open:
            break
        loop.step()
    assert not loop.open  # everybody comes to an end
    assert loop.scheduler.pages.in_use == 0
    return loop


@pytest.mark.parametrize(
    ("slots", "points"), [(3, 6), (3, 0), *(pytest.param(*both, marks=pytest.mark.slow) for both in ((1, 4), (8, 30)))]
)
def test_a_hundred_thousand_random_steps_serve_everybody(slots: int, points: int, seed: int) -> None:
    """No page has two owners who write, none is lost, what runs has all the memory that it can need, nobody starves."""
    loop = served(seed, slots, points, 25_000)
    assert loop.longest_wait <= max(TURN, loop.longest_turn) + 1
    wanted = [
        "turned out",
        "held gave way",
        "ended",
        *(["went on", "went on after a turn"] if points else ["read again"]),
    ]
    assert all(loop.seen[what] > 20 for what in wanted), loop.seen
    assert loop.scheduler.preempted == loop.seen["turned out"] + loop.seen["held gave way"]


# --- these tests can fail --------------------------------------------------------------------------------------------


def _newest_first(self: Scheduler, one: Request) -> None:
    one.since = self._steps
    self.waiting.appendleft(one)


def _turned_out_at_once(self: Scheduler, one: Request) -> bool:
    return self._steps - one.since >= self._turn


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "planted", "points"),
    [
        ("add", _newest_first, 6),
        ("_had_its_turn", lambda self, one: False, 6),
        ("_had_its_turn", _turned_out_at_once, 0),
        ("_needs", lambda self, one: -(-one.length // PAGE), 6),
    ],
    ids=["newest first", "nobody gives way", "turned out before it came further", "memory for what is there alone"],
)
def test_a_bug_planted_in_the_scheduler_is_caught(
    where: str, planted: object, points: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scheduler, where, planted)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        test_a_hundred_thousand_random_steps_serve_everybody(3, points, seed)


# --- by hand ---------------------------------------------------------------------------------------------------------


def made(slots: int = 1, pages: int = 8, chunk: int = 100) -> Scheduler:
    return Scheduler(slots, chunk, Pages(pages, PAGE), TURN)


def run(scheduler: Scheduler, times: int = 1) -> list[int]:
    """Steps in which everybody gets a token; who ran in the last."""
    ran: list[int] = []
    for _ in range(times):
        for one in scheduler.in_the_way():
            scheduler.turn_out(one)
        scheduler.admit()
        ran = []
        for item in scheduler.schedule():
            item.request.done = item.end
            item.request.output.append(7)
            ran.append(item.request.number)
    return ran


def test_two_take_turns_for_one_slot() -> None:
    scheduler = made(pages=16)
    for number in range(2):
        scheduler.add(request(number, [7, 8], 30))
    assert [run(scheduler)[0] for _ in range(30)] == [0] * 6 + [1] * 6 + [0] * 6 + [1] * 6 + [0] * 6


def test_alone_nobody_gives_way() -> None:
    scheduler = made()
    scheduler.add(request(0, [7], 30))
    assert [run(scheduler)[0] for _ in range(20)] == [0] * 20
    assert scheduler.preempted == 0


def test_memory_is_promised_and_nobody_overtakes() -> None:
    """8 pages: 5 for the first; the second needs 6 and waits; the third would fit, and waits behind it."""
    scheduler = made(slots=3)
    for number, tokens in enumerate((20, 24, 4)):
        scheduler.add(request(number, [7, 8], tokens - 2))
    assert run(scheduler) == [0]
    scheduler.remove(scheduler.running[0])
    assert run(scheduler) == [1, 2]
    assert scheduler.pages.room() == 1


def test_who_is_on_hold_gives_way_at_once_and_keeps_its_slot_if_nobody_waits() -> None:
    scheduler = made()
    first, second = request(0, [7], 9), request(1, [8], 9)
    scheduler.add(first)
    assert run(scheduler) == [0]
    first.held = True
    assert scheduler.stalled
    assert (run(scheduler), first.slot, scheduler.preempted) == ([], 0, 0)
    scheduler.add(second)
    assert not scheduler.stalled
    assert (run(scheduler), scheduler.preempted) == ([1], 1)
    first.held = False
    scheduler.remove(second)
    assert run(scheduler) == [0]


def test_no_more_give_way_than_must() -> None:
    """Three hold 3, 2 and 3 pages; the next needs 4 and gets those of the two that have run longest."""
    scheduler = made(slots=4)
    for number, tokens in enumerate((12, 8, 12)):
        scheduler.add(request(number, [7, 8], tokens - 2))
        run(scheduler)
    scheduler.add(request(3, [7, 8], 14))
    assert run(scheduler, TURN) == [0, 1, 2]
    assert [one.number for one in scheduler.in_the_way()] == [0, 1]
