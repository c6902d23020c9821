"""Which tokens run next. No torch."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

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
        """The token ids that run."""
        return [*self.request.tokens(self.start, self.end), *self.draft]


class Scheduler:
    """First come, first served into a fixed number of slots. Each step decodes every sequence that can, then spends
    what is left of `chunk` tokens on prompts, oldest first."""

    def __init__(self, slots: int, chunk: int) -> None:
        self._free = list(range(slots - 1, -1, -1))
        self._chunk = chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Move requests into free slots; returns those newly admitted."""
        admitted = []
        while self._free and self.waiting:
            request = self.waiting.popleft()
            request.slot = self._free.pop()
            admitted.append(request)
        self.running += admitted
        return admitted

    def schedule(self) -> list[Work]:
        """The next step's work, in a fixed order; empty when nothing runs."""
        budget = self._chunk
        work = []
        for request in sorted(self.running, key=lambda r: r.length - r.done > 1):  # stable: decodes first
            pending = request.length - request.done
            take = pending if pending == 1 else min(pending, budget)
            if take > 0:
                done, ready = request.done, take == pending
                work.append(Work(request, done, done + take, ready, request.draft if ready else ()))
                budget -= take
        return work

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its slot."""
        if request in self.running:
            self.running.remove(request)
            self._free.append(request.slot)
        elif request in self.waiting:
            self.waiting.remove(request)
