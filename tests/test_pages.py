"""The books of the cache's pages, over a hundred thousand random steps. No torch."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from dsv4.cache.pages import ROOT, Found, Pages, prefix_name

PAGE = 4


def names(ids: list[int]) -> list[bytes]:
    found: list[bytes] = []
    for start in range(0, len(ids) // PAGE * PAGE, PAGE):
        found.append(prefix_name(found[-1] if found else ROOT, ids[start : start + PAGE]))
    return found


@dataclass
class Sequence:
    """One that holds pages."""

    ids: list[int]
    done: int
    pages: list[int]
    shared: int


@dataclass
class World:
    """Sequences over `pages`, what each page and each state was last written for, and a check of everything."""

    pages: Pages
    draw: random.Random
    live: list[Sequence] = field(default_factory=list)
    written: dict[int, tuple[int, ...]] = field(default_factory=dict)  # page → all ids up to its end
    states: dict[int, tuple[int, ...]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    def begin(self) -> None:
        """A prompt of few different tokens, so that many begin alike; or one that goes on from a kept state."""
        ids = [self.draw.choice((1, 1, 1, 2)) for _ in range(self.draw.randint(1, 24))]
        if self.states and self.draw.random() < 0.5:
            ids = [*self.draw.choice(list(self.states.values())), *ids][:24]
        found = self.pages.find(ids, names(ids))
        self.found(ids, found)
        need = -(-len(ids) // PAGE)
        if need - len(found.pages) <= self.pages.room(found.pages):
            took = self.pages.take(found.pages, need)
            assert took == list(found.pages)
            self.live.append(Sequence(ids, found.length, took, len(found.pages)))
            self.seen["hits"] += found.length > 0
        else:
            self.seen["full"] += 1

    def found(self, ids: list[int], found: Found) -> None:
        """It is the longest there is, and what it names was written for these very ids."""
        kept = [self.states[point] for point in self.pages._points]
        fitting = [len(state) for state in kept if len(state) < len(ids) and tuple(ids[: len(state)]) == state]
        assert found.length == max(fitting, default=0)
        if found.point is not None:
            assert self.states[found.point] == tuple(ids[: found.length])
        assert len(found.pages) == found.length // PAGE <= found.known
        for number, page in enumerate(found.pages, 1):
            assert self.written[page] == tuple(ids[: number * PAGE])

    def go_on(self) -> None:
        """Write some tokens, make full pages known, keep the state."""
        one = self.draw.choice(self.live)
        end = self.draw.randint(one.done, len(one.ids))
        self.pages.grow(one.pages, -(-end // PAGE))
        for number in range(one.shared, -(-end // PAGE)):
            self.written[one.pages[number]] = tuple(one.ids[: min(end, (number + 1) * PAGE)])
        known = names(one.ids[:end])
        for number in range(one.shared, len(known)):
            page = self.pages.share(known[number], one.pages[number])
            self.seen["twins"] += page != one.pages[number]
            one.pages[number] = page
        one.done, one.shared = end, len(known)
        if end and self.draw.random() < 0.5:
            before = set(self.pages._points)
            point = self.pages.keep(known[-1] if known else ROOT, one.ids[len(known) * PAGE : end])
            if point is not None:
                self.seen["states"] += 1
                self.seen["displaced"] += point in before
                self.states[point] = tuple(one.ids[:end])

    def end(self) -> None:
        one = self.live.pop(self.draw.randrange(len(self.live)))
        others, need = [other.pages for other in self.live], -(-len(one.ids) // PAGE)
        mine = sum(all(page not in pages for pages in others) for page in one.pages) + need - len(one.pages)
        assert self.pages.freed_by([(one.pages, need)]) == mine
        room = self.pages.room()
        self.pages.release(one.pages, need)
        assert self.pages.room() == room + mine

    def check(self) -> None:
        """Every page is free, idle or used as often as it is held; no state and no page is without what it follows."""
        pages = self.pages
        users = Counter(page for one in self.live for page in one.pages)
        assert [users[page] for page in range(pages.count)] == pages._users
        free, idle = set(pages._free), set(pages._idle)
        assert len(free) == len(pages._free)
        assert sorted([*free, *idle, *users]) == list(range(pages.count))
        assert pages.in_use == len(users)
        assert pages._promised == sum(-(-len(one.ids) // PAGE) - len(one.pages) for one in self.live)
        assert 0 <= pages.room() == len(free) + len(idle) - pages._promised
        assert {name: page for page, name in pages._name_of.items()} == pages._page_of
        assert idle <= set(pages._name_of)
        assert not free & set(pages._name_of)
        for page in pages._name_of:
            ids = self.written[page]
            assert len(ids) % PAGE == 0
            assert all(name in pages._page_of for name in names(list(ids)))  # nothing outlives what it follows
        for point, (name, tail) in pages._points.items():
            assert pages._behind[name][tail] == point
            assert name == ROOT or name in pages._page_of
        assert sum(map(len, pages._behind.values())) == len(pages._points)


def test_a_hundred_thousand_random_steps_lose_no_page(seed: int) -> None:
    """No page has two owners who write, none is lost, counts are right, a prefix is found where its very ids stand."""
    draw = random.Random(seed)
    world = World(Pages(17, PAGE, 6), draw)
    for number in range(100_000):
        step = draw.choice((world.begin, world.go_on, world.go_on, world.end)) if world.live else world.begin
        step()
        if number % 10 == 0:
            world.check()
    world.seen["evicted"] = sum(page not in world.pages._name_of for page in world.written)
    assert all(world.seen[what] > 5 for what in ("hits", "full", "twins", "states", "displaced")), world.seen
    while world.live:
        world.end()
    world.check()
    assert world.pages.room() == 17


def _leak(self: Pages, page: int) -> None:
    self._users[page] -= 1


def _first_page_first(self: Pages, pages: list[int], promise: int) -> None:
    self._promised -= promise - len(pages)
    for page in pages:
        self._drop(page)


def _promise_forgotten(self: Pages, shared: list[int], promise: int) -> list[int]:
    for page in shared:
        self._use(page)
    return list(shared)


def _states_outlive_pages(self: Pages) -> int:
    page, _ = self._idle.popitem(last=False)
    del self._page_of[self._name_of.pop(page)]
    return page


def _weak_name(before: bytes, ids: list[int]) -> bytes:
    return bytes([len(before) % 251, sum(ids) % 4])


@pytest.mark.parametrize(
    ("where", "planted"),
    [
        ("_drop", _leak),
        ("release", _first_page_first),
        ("take", _promise_forgotten),
        ("_evict", _states_outlive_pages),
        ("_use", lambda self, page: self._idle.pop(page, None)),
    ],
    ids=[
        "pages never free",
        "a page outlives those it follows",
        "promises not counted",
        "states outlive their pages",
        "sharing not counted",
    ],
)
def test_a_bug_planted_in_the_books_is_caught(
    where: str, planted: object, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pages, where, planted)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        test_a_hundred_thousand_random_steps_lose_no_page(seed)


def test_a_weak_name_is_caught(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "prefix_name", _weak_name)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        test_a_hundred_thousand_random_steps_lose_no_page(seed)


# --- by hand ---------------------------------------------------------------------------------------------------------


def taken(pages: Pages, count: int) -> list[int]:
    """That many, empty."""
    took = pages.take((), count)
    pages.grow(took, count)
    return took


def kept(pages: Pages, ids: list[int]) -> int | None:
    """A sequence of `ids` that ran, left its state and ended."""
    took, known = taken(pages, -(-len(ids) // PAGE)), names(ids)
    took = [*(pages.share(name, page) for name, page in zip(known, took, strict=False)), *took[len(known) :]]
    point = pages.keep(known[-1] if known else ROOT, ids[len(known) * PAGE :])
    pages.release(took, len(took))
    return point


def test_a_prefix_is_found_up_to_its_longest_state_and_never_whole() -> None:
    pages = Pages(8, PAGE, 4)
    for ids in ([1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8]):
        assert kept(pages, ids) is not None

    def length(*ids: int) -> int:
        return pages.find(ids, names(list(ids))).length

    assert length(1, 2, 3, 4, 5, 6, 7, 8, 9) == 8
    assert length(1, 2, 3, 4, 5, 6, 7, 8) == 6  # its own last token has to run
    assert length(1, 2, 3, 4, 5, 9, 9, 9, 9) == 3
    assert length(1, 2, 9) == 0
    assert pages.find([1, 2, 3, 4, 9], names([1, 2, 3, 4, 9])).known == 1


def test_the_longest_unused_gives_way() -> None:
    pages = Pages(3, PAGE, 2)
    assert kept(pages, [1, 1, 1, 1]) == 0
    assert kept(pages, [2, 2]) == 1
    assert pages.find([1, 1, 1, 1, 5], names([1, 1, 1, 1])).length == 4  # used again
    assert kept(pages, [3, 3, 3, 3]) == 1
    assert pages.find([2, 2, 5], []).length == 0
    pages.release(taken(pages, 2), 2)  # one was free; the page of 1 1 1 1 is the older one
    assert pages.find([1, 1, 1, 1, 5], names([1, 1, 1, 1])).length == 0
    assert pages.find([3, 3, 3, 3, 5], names([3, 3, 3, 3])).length == 4


def test_a_promise_takes_no_page_before_it_is_used() -> None:
    """What was promised serves as memory until then."""
    pages = Pages(3, PAGE, 2)
    assert kept(pages, [1, 1, 1, 1]) == 0
    took = pages.take((), 3)
    assert (pages.room(), pages.in_use) == (0, 0)
    pages.grow(took, 2)
    assert (pages.room(), pages.in_use) == (0, 2)
    assert pages.find([1, 1, 1, 1, 5], names([1, 1, 1, 1])).length == 4
    pages.grow(took, 3)
    assert pages.find([1, 1, 1, 1, 5], names([1, 1, 1, 1])).length == 0
    pages.release(took, 3)
    assert (pages.room(), pages.in_use) == (3, 0)


def test_what_is_kept_already_takes_no_second_place() -> None:
    pages = Pages(4, PAGE, 2)
    assert (kept(pages, [1, 1]), kept(pages, [1, 1]), kept(pages, [2])) == (0, None, 1)
    assert kept(Pages(4, PAGE, 0), [1, 1]) is None
