"""Which requests have a slot and pages, and which tokens run next. No torch.

A request is admitted when there is a slot and every token that it can come to (`Request.limit`) can be promised its
page: what runs never lacks memory. Admission is in order of arrival; who does not fit is waited for, nobody overtakes.

Who waits may take the place of others. A request on hold gives way at once. A request that runs gives way to one that
has waited `turn` steps, after `turn` steps of its own in which it came further than ever before; the longest goes
first, and then waits behind all others. So the n-th in the queue is admitted after at most n times `turn` + 1 steps (a
turn is longer where so few steps do not bring a request further), and every request comes to its end.

Being turned out is like ending: the state is kept for whoever goes on with the same tokens, if nobody needs the room,
and is read again otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from dsv4.cache.pages import ROOT, Found, Pages, prefix_name
from dsv4.engine.request import Request


class Work(NamedTuple):
    """Positions start .. end - 1 of a request run in this step, then its draft.

    If `sample`, logits are wanted of position end - 1 and of every drafted token.
    """

    request: Request
    start: int
    end: int
    sample: bool
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """The token ids that run, 0 for one that nobody has read yet."""
        known = self.request.tokens(self.start, self.end)
        return [*known, *[0] * (self.end - self.start - len(known)), *self.draft]

    @property
    def size(self) -> int:
        """How many they are."""
        return self.end - self.start + len(self.draft)

    @property
    def asked(self) -> int:
        """Rows of logits that are wanted."""
        return 1 + len(self.draft) if self.sample else 0


class Scheduler:
    """A fixed number of slots, and pages that all share.

    Each step decodes every sequence that can, then spends what is left of `chunk` tokens, at least one, on prompts,
    oldest first. A request that is `held` does not run.
    """

    def __init__(self, slots: int, chunk: int, pages: Pages, turn: int) -> None:
        self._free = list(range(slots - 1, -1, -1))
        self._chunk, self.pages, self._turn = chunk, pages, turn
        self._steps = 0
        self.preempted = 0  # times that a request was turned out
        self.reused = 0  # tokens of prompts that need not run
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def stalled(self) -> bool:
        """Whether no step can do anything until a request comes, goes or is released."""
        return all(request.held for request in (*self.running, *self.waiting))

    # --- who runs --------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request."""
        request.since = self._steps
        self.waiting.append(request)

    def in_the_way(self) -> list[Request]:
        """Running requests that have to give way (`turn_out`) so that the first in the queue can be admitted."""
        first = self._first()
        if first is None or self._fits(first, self._find(first) if self._free else None):
            return []
        due = self._steps - first.since >= self._turn
        others = [r for r in self.running if r.held or (due and self._had_its_turn(r))]
        others.sort(key=lambda r: (not r.held, r.since))
        for count in range(1, len(others) + 1):
            freed = self.pages.freed_by((r.pages, self._needs(r)) for r in others[:count])
            if self._needs(first) <= self.pages.room() + freed:
                return others[:count]
        return []

    def turn_out(self, request: Request) -> None:
        """Put a running request at the end of the queue."""
        request.reached = max(request.reached, request.done)
        self.remove(request)
        self.add(request)
        self.preempted += 1

    def admit(self) -> list[Request]:
        """Give requests slots and pages, in order of arrival; returns those newly admitted.

        `done` of each says how far the pages that it shares with others bring it, if it has a `point`.
        """
        admitted = []
        while self._free and (request := self._first()) is not None:
            found = self._find(request)
            if not self._fits(request, found):
                break
            self.waiting.remove(request)
            request.slot, request.since = self._free.pop(), self._steps
            request.pages = self.pages.take(found.pages, self._needs(request))
            request.done, request.point, request.shared = found.length, found.point, len(found.pages)
            self.pages.grow(request.pages, self._pages_of(found.length))
            if request.cached is None:
                request.cached = found.length
                self.reused += found.length
            last = (request.length - 1) // self.pages.page
            request.stops = {n * self.pages.page for n in (found.known, last)}
            admitted.append(request)
        self.running += admitted
        return admitted

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its slot and its pages."""
        if request in self.running:
            self.running.remove(request)
            self._free.append(request.slot)
            self.pages.release(request.pages, self._needs(request))
            request.pages, request.draft = [], ()
        elif request in self.waiting:
            self.waiting.remove(request)

    def _first(self) -> Request | None:
        return next((request for request in self.waiting if not request.held), None)

    def _needs(self, request: Request) -> int:
        return self._pages_of(request.limit)

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.pages.page)

    def _fits(self, request: Request, found: Found | None) -> bool:
        if found is None:
            return False
        return self._needs(request) - len(found.pages) <= self.pages.room(found.pages)

    def _had_its_turn(self, request: Request) -> bool:
        return self._steps - request.since >= self._turn and request.done > request.reached

    # --- what can be gone on from ------------------------------------------------------------------------------------

    def _find(self, request: Request) -> Found:
        return self.pages.find(request.tokens(0, request.length), self._names(request, request.length))

    def _names(self, request: Request, length: int) -> Sequence[bytes]:
        """Of the prefixes of whole pages among its first `length` tokens."""
        page, names = self.pages.page, request.names
        for start in range(len(names) * page, length // page * page, page):
            names.append(prefix_name(names[-1] if names else ROOT, request.tokens(start, start + page)))
        return names[: length // page]

    def share(self, request: Request, end: int) -> None:
        """Make the pages known that `end` tokens fill. Some of them may be others then, with the same content."""
        names = self._names(request, end)
        for number in range(request.shared, len(names)):
            request.pages[number] = self.pages.share(names[number], request.pages[number])
        request.shared = max(request.shared, len(names))

    def points(self, request: Request, start: int, end: int) -> list[tuple[int, int]]:
        """States to keep now that positions start .. end - 1 have run: pairs of a place and a length.

        They are those at the last full page of a prompt, where a known prefix ended, and behind an answer.
        """
        lengths = {n for n in request.stops if start < n <= end}
        if request.finish:
            lengths.add(end)
        places = [(self.keep(request, length), length) for length in sorted(lengths)]
        return [(place, length) for place, length in places if place is not None]

    def keep(self, request: Request, length: int) -> int | None:
        """A place for the state behind the first `length` tokens, whose full pages are shared; None if it is kept."""
        names = self._names(request, length)
        return self.pages.keep(names[-1] if names else ROOT, request.tokens(len(names) * self.pages.page, length))

    # --- what runs ---------------------------------------------------------------------------------------------------

    def schedule(self) -> list[Work]:
        """The next step's work, in a fixed order, and pages for it; empty when nothing runs."""
        ready = [r for r in self.running if not r.held]
        decodes = [r for r in ready if r.coming - r.done == 1 and not (r.flying and r.coming == r.limit)]
        work = [Work(r, r.done, r.coming, True, r.draft) for r in decodes]
        budget = max(self._chunk - len(decodes), 1)  # a prompt always moves on
        for request in ready:
            take = min(request.length - request.done, budget)
            if take and request not in decodes:
                end = request.done + take
                work.append(Work(request, request.done, end, end == request.length))
                budget -= take
        for item in work:
            self.pages.grow(item.request.pages, self._pages_of(item.end + len(item.draft)))
        self._steps += bool(work)
        return work
