"""Who holds which page of compressed rows, and which prefixes of token ids are still there. No torch.

A page is what a fixed number of consecutive tokens leave behind in all layers that compress. It is used by sequences
(several may share one: nobody writes into a page whose tokens are all there), or idle (used by nobody, but known by the
ids of all tokens up to its end, until it is the longest unused when one is needed), or free. A sequence is promised all
pages that it can come to need, and takes them one by one: until then they serve as memory of what was.

What else the next token of a prefix needs (windows, compressor tails) is kept at some lengths only: its *points*. A
prompt goes on from a point, which need not lie at the end of a page.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ROOT = b""  # the name of the prefix without tokens


def prefix_name(before: bytes, ids: Sequence[int]) -> bytes:
    """The name of the prefix `before` with a page of `ids` behind it: 256 bits that depend on all ids up to there."""
    return hashlib.blake2b(before + array("q", ids).tobytes(), digest_size=32).digest()


class Found(NamedTuple):
    """What is there of a prompt."""

    length: int = 0  # its first tokens, which need not run
    pages: Sequence[int] = ()  # the full pages of these
    point: int | None = None  # where the rest of their state lies
    known: int = 0  # its first pages that are there, with or without a point


class Pages:
    """The books of `count` pages of `page` tokens, and of `points` places for states."""

    def __init__(self, count: int, page: int, points: int = 0) -> None:
        self.count, self.page = count, page
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._promised = 0  # pages that sequences have yet to take
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # longest unused first; a page always before those it follows
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._spare = list(range(points - 1, -1, -1))
        self._points: OrderedDict[int, tuple[bytes, tuple[int, ...]]] = OrderedDict()  # longest unused first
        self._behind: dict[bytes, dict[tuple[int, ...], int]] = {}  # name → ids after it → point

    @property
    def in_use(self) -> int:
        """Pages that sequences hold."""
        return self.count - len(self._free) - len(self._idle)

    # --- prefixes --------------------------------------------------------------------------------------------------

    def find(self, ids: Sequence[int], names: Sequence[bytes]) -> Found:
        """The longest prefix of `ids` to go on from, shorter than they are. `names`: of the prefixes of whole pages."""
        length, point, known = 0, None, 0
        for known, name in enumerate((ROOT, *names)):
            if known and name not in self._page_of:
                known -= 1
                break
            start = known * self.page
            for tail, place in self._behind.get(name, {}).items():
                end = start + len(tail)
                if length < end < len(ids) and tuple(ids[start:end]) == tail:
                    length, point = end, place
        if point is not None:
            self._points.move_to_end(point)
        return Found(length, [self._page_of[name] for name in names[: length // self.page]], point, known)

    def share(self, name: bytes, page: int) -> int:
        """Make known that `page` ends the prefix `name`. Returns the page to use from now on: a known twin, if any."""
        known = self._page_of.setdefault(name, page)
        if known == page:
            self._name_of[page] = name
        else:  # the same tokens gave the same bits
            self._use(known)
            self._drop(page)
        return known

    def keep(self, name: bytes, tail: Sequence[int]) -> int | None:
        """A place for the state behind the prefix `name` and `tail`; None if it is kept already or nothing can be.

        All pages of the prefix have to be known. The longest unused state gives way.
        """
        assert name == ROOT or name in self._page_of
        ids = tuple(tail)
        known = self._behind.get(name, {}).get(ids)
        if known is not None:
            self._points.move_to_end(known)
            return None
        if not self._spare and self._points:
            self._forget(next(iter(self._points)))
        if not self._spare:
            return None
        point = self._spare.pop()
        self._points[point] = (name, ids)
        self._behind.setdefault(name, {})[ids] = point
        return point

    def _forget(self, point: int) -> None:
        name, tail = self._points.pop(point)
        del self._behind[name][tail]
        if not self._behind[name]:
            del self._behind[name]
        self._spare.append(point)

    # --- pages -----------------------------------------------------------------------------------------------------

    def room(self, shared: Sequence[int] = ()) -> int:
        """Pages that a sequence can be promised beside those it will share."""
        return len(self._free) + len(self._idle) - self._promised - sum(page in self._idle for page in shared)

    def freed_by(self, holders: Iterable[tuple[Sequence[int], int]]) -> int:
        """How much more room there is when sequences with these pages and promises give them back."""
        held, outstanding = Counter[int](), 0
        for pages, promise in holders:
            held.update(pages)
            outstanding += promise - len(pages)
        return outstanding + sum(self._users[page] == count for page, count in held.items())

    def take(self, shared: Sequence[int], promise: int) -> list[int]:
        """The pages that a sequence begins with: those it shares. It will find `promise` in all, if there is `room`."""
        for page in shared:
            self._use(page)
        self._promised += promise - len(shared)
        return list(shared)

    def grow(self, pages: list[int], count: int) -> None:
        """Add empty pages to a sequence's own, up to `count` of those it was promised."""
        for _ in range(count - len(pages)):
            page = self._free.pop() if self._free else self._evict()
            self._users[page] = 1
            self._promised -= 1
            pages.append(page)

    def release(self, pages: Sequence[int], promise: int) -> None:
        """Give all back. The last page goes first, so that no page outlives those it follows."""
        self._promised -= promise - len(pages)
        for page in reversed(pages):
            self._drop(page)

    def _drop(self, page: int) -> None:
        assert self._users[page] > 0
        self._users[page] -= 1
        if not self._users[page]:
            if page in self._name_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _use(self, page: int) -> None:
        self._users[page] += 1
        self._idle.pop(page, None)

    def _evict(self) -> int:
        """The page unused for the longest time, and with it all states that rest on it."""
        page, _ = self._idle.popitem(last=False)
        name = self._name_of.pop(page)
        del self._page_of[name]
        for point in list(self._behind.get(name, {}).values()):
            self._forget(point)
        return page
