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
    """First come, first served into a fixed number of slots.

    Each step decodes every sequence that can, then spends what is left of `chunk` tokens, at least one, on prompts,
    oldest first. A request that is `held` keeps its slot and waits.
    """

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

    @property
    def stalled(self) -> bool:
        """Whether no step can do anything until a request comes, goes or is released."""
        return all(request.held for request in self.running) and not (self._free and self.waiting)

    def schedule(self) -> list[Work]:
        """The next step's work, in a fixed order; empty when nothing runs."""
        ready = [r for r in self.running if not r.held]
        decodes = [r for r in ready if r.length - r.done == 1]
        work = [Work(r, r.done, r.length, True, r.draft) for r in decodes]
        budget = max(self._chunk - len(decodes), 1)  # a prompt always moves on
        for request in ready:
            take = min(request.length - request.done, budget)
            if take and request not in decodes:
                end = request.done + take
                work.append(Work(request, request.done, end, end == request.length))
                budget -= take
        return work

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its slot."""
        if request in self.running:
            self.running.remove(request)
            self._free.append(request.slot)
        elif request in self.waiting:
            self.waiting.remove(request)
