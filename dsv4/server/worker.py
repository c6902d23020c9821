"""The engine in a thread of its own, and the roads to and from it.

In: requests are counted when they are accepted, and no more are accepted than there are slots and places in the queue.
Out: each client has a `Reading`, which the engine fills step by step. A client that leaves `unread` tokens unread is
put on hold: its requests wait, and give their slots to whoever waits for one; all others go on at full speed. After
`stall` seconds of that they end. So does a request at its deadline, the server's or its own. What a request answers
does not depend on any of this.

Nothing but this thread touches the engine while it runs; others read what never changes (`Engine.check`) and counters.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv4.engine.request import Delta, Sampling
from dsv4.errors import DSV4Error
from dsv4.llm import LLM
from dsv4.server.metrics import Metrics
from dsv4.server.options import ServerOptions
from dsv4.server.refusal import Refusal

log = logging.getLogger("dsv4.server")

Asked = tuple[Sequence[int], Sampling]  # a prompt, and how to go on with it


@dataclass
class Clock:
    """When a request was accepted, and when its last token came."""

    began: float
    last: float | None = None


class Reading:
    """What one client waits for: deltas of its requests, each with the request's place in what was submitted."""

    def __init__(self, worker: Worker, loop: asyncio.AbstractEventLoop, count: int, seconds: float | None) -> None:
        self._worker, self.loop = worker, loop
        self._items: deque[tuple[int, Delta]] = deque()
        self._fresh = asyncio.Event()
        self._failed: DSV4Error | None = None
        self.sent = self.taken = 0  # written by the engine's thread and by the event loop's, in this order
        self.held_since: float | None = None  # the engine's thread alone writes it
        self.clocks = [Clock(time.monotonic()) for _ in range(count)]
        self.seconds = seconds  # that its requests have, None for all the time
        self.open = set(range(count))

    @property
    def left(self) -> float:
        """Seconds until its deadline."""
        return math.inf if self.seconds is None else self.clocks[0].began + self.seconds - time.monotonic()

    async def arrival(self) -> None:
        """Wait until there is something to take; a Refusal if nothing more will come."""
        while not self._items:
            if self._failed is not None:
                raise self._failed
            self._fresh.clear()
            await self._fresh.wait()

    async def next(self) -> list[tuple[int, Delta]]:
        """All that has come since the last time, at least one; a Refusal if nothing more will come."""
        await self.arrival()
        items = list(self._items)
        self._items.clear()
        self.taken += len(items)
        if self.held_since is not None:
            self._worker.post(lambda: self._worker.release(self))
        return items

    def deliver(self, items: Sequence[tuple[int, Delta]]) -> None:
        """On the event loop's thread: take in what a step gave."""
        self._items.extend(items)
        self._fresh.set()

    def fail(self, error: DSV4Error) -> None:
        """On the event loop's thread: nothing more will come."""
        self._failed = error
        self._fresh.set()


class Worker:
    """Owns the engine from `start` to `stop`. Its public methods are for the event loop's thread."""

    def __init__(self, llm: LLM, options: ServerOptions, metrics: Metrics) -> None:
        self._engine, self._options, self.metrics = llm.engine, options, metrics
        self.slots = llm.resolved.options.max_sequences
        self.live = 0  # requests accepted and not yet ended
        self.draining = False
        self.crash: str | None = None
        self._stopping = False
        self._step_began: float | None = None  # the engine's thread alone writes it
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._clients: dict[int, tuple[Reading, int]] = {}
        self._thread = threading.Thread(target=self._run, name="dsv4-engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Accepted requests that have no slot yet."""
        return max(self.live - self.slots, self._engine.waiting)

    @property
    def step_age(self) -> float:
        """Seconds that the engine's current step has been running, 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def hang(self) -> str | None:
        """Why the engine seems to hang, None while it does not. Worked out when asked: no thread watches another."""
        age, limit = self.step_age, self._options.step_limit
        return f"a step has been running for {age:.1f} s; limit {limit:g} s" if 0 < limit < age else None

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def drain(self) -> None:
        """Accept nothing more; what runs goes on to its end."""
        self.draining = True

    def stop(self) -> None:
        """End the thread after its current step; what still runs is dropped."""
        with self._wake:
            self.draining = self._stopping = True
            self._wake.notify()
        self._thread.join(60)

    def check(self) -> None:
        """Refusal if nothing can be served now."""
        if self.crash is not None:
            raise Refusal("the engine has stopped", status=503, code="engine_stopped", do="restart the server")
        if self.draining:
            raise Refusal("the server is shutting down", status=503, code="draining", retry_after=5)

    def submit(self, asked: Sequence[Asked], timeout: float | None = None) -> Reading:
        """Accept all of these or none. RequestError for one that can never be served, Refusal when there is no room.

        After `timeout` seconds, or the server's deadline if that is less, they end.
        """
        self.check()
        for prompt, sampling in asked:
            self._engine.check(prompt, sampling)
        room = self.slots + self._options.queue
        if len(asked) > room:
            raise Refusal("too many answers asked for at once", got=len(asked), wanted=f"at most {room}", param="n")
        seconds = min((some for some in (timeout, self._options.deadline) if some is not None), default=None)
        reading = Reading(self, asyncio.get_running_loop(), len(asked), seconds)
        with self._wake:
            self.check()  # again: from here on the thread cannot end without seeing what is in its inbox
            if self.live + len(asked) > room:
                raise Refusal(
                    "the queue is full",
                    status=429,
                    code="queue_full",
                    got=f"{self.live} requests, {self.waiting} of them waiting",
                    wanted=f"at most {room}",
                    retry_after=self._retry_after(),
                )
            self.live += len(asked)
            self._inbox.append(lambda: self._begin(reading, asked))
            self._wake.notify()
        self.metrics.tokens_in += sum(len(prompt) for prompt, _ in asked)
        return reading

    def _retry_after(self) -> int:
        """About as long as the requests that ended so far took, in whole seconds."""
        ended = sum(self.metrics.whole.counts)
        return min(60, max(1, round(self.metrics.whole.sum / ended))) if ended else 1

    def close(self, reading: Reading) -> None:
        """The client is done or gone: whatever it still has running stops before the next step."""
        if reading.open:
            self.metrics.ended["cancelled"] += len(reading.open)
            reading.open.clear()
            self.post(lambda: self._drop(reading))

    def post(self, action: Callable[[], None]) -> None:
        """Have the engine's thread do something between two steps."""
        with self._wake:
            self._inbox.append(action)
            self._wake.notify()

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                for action in self._actions():
                    action()
                if not self._engine.stalled:
                    self._hand_out(self._step())
                self._end_late()
        except Exception as error:  # whatever it is: nobody may wait for an engine that is gone
            frames = "".join(traceback.format_tb(error.__traceback__))  # without the message: it may quote a user
            log.error("the engine stopped: %s\n%s", type(error).__name__, frames)
            with self._wake:
                self.crash = type(error).__name__
        finally:
            self._abandon()

    def _step(self) -> Sequence[Delta]:
        """One step. That it passed the limit is logged at its end too: nobody may have asked while it ran."""
        self._step_began = time.monotonic()
        try:
            return self._engine.step()
        finally:
            age, limit = self.step_age, self._options.step_limit
            self._step_began = None
            if 0 < limit < age:
                log.warning("a step took %.1f s; limit %g s", age, limit)

    def _actions(self) -> list[Callable[[], None]]:
        """What was posted; waits for something to do, but not past the moment at which a request may have to end."""
        with self._wake:
            if not self._inbox and not self._stopping and self._engine.stalled:
                left = (reading.left for reading, _ in self._clients.values())
                self._wake.wait(max(0.0, min(1.0, self._options.stall, *left)) if self._clients else None)
            actions, self._inbox = self._inbox, []
        return actions

    def _begin(self, reading: Reading, asked: Sequence[Asked]) -> None:
        for place, (prompt, sampling) in enumerate(asked):
            self._clients[self._engine.add(prompt, sampling)] = (reading, place)

    def _numbers(self, reading: Reading) -> list[int]:
        return [number for number, (theirs, _) in self._clients.items() if theirs is reading]

    def _drop(self, reading: Reading) -> None:
        for number in self._numbers(reading):
            self._engine.cancel(number)
            self._forget(number)

    def _forget(self, number: int) -> None:
        del self._clients[number]
        with self._wake:
            self.live -= 1

    def _hand_out(self, deltas: Sequence[Delta]) -> None:
        """To each client its own, in one call of the event loop each step."""
        given: dict[Reading, list[tuple[int, Delta]]] = {}
        for delta in deltas:
            reading, place = self._clients[delta.number]
            given.setdefault(reading, []).append((place, delta))
            if delta.finish:
                self._forget(delta.number)
        for reading, items in given.items():
            reading.sent += len(items)
            if reading.sent - reading.taken > self._options.unread:
                self._hold(reading)
        for loop in {reading.loop for reading in given}:
            mine = [(reading, items) for reading, items in given.items() if reading.loop is loop]
            loop.call_soon_threadsafe(self._deliver, mine, time.monotonic())

    def _hold(self, reading: Reading) -> None:
        if reading.held_since is None:
            reading.held_since = time.monotonic()
            for number in self._numbers(reading):
                self._engine.hold(number, True)
        if reading.sent - reading.taken <= self._options.unread:
            self.release(reading)  # it was read while we looked, and did not see the hold

    def release(self, reading: Reading) -> None:
        """On the engine's thread: a client that was on hold has read again."""
        if reading.held_since is not None and reading.sent - reading.taken <= self._options.unread:
            reading.held_since = None
            for number in self._numbers(reading):
                self._engine.hold(number, False)

    def _end_late(self) -> None:
        """End what has been on hold for too long, and what is past its deadline."""
        for reading in {reading for reading, _ in self._clients.values()}:
            late = self._late(reading)
            if late is not None:
                self._drop(reading)
                reading.loop.call_soon_threadsafe(self._fail, reading, *late)

    def _late(self, reading: Reading) -> tuple[Refusal, str] | None:
        """Why its requests may not go on, and the outcome that counts this."""
        unread, stall = self._options.unread, self._options.stall
        if reading.held_since is not None and reading.held_since < time.monotonic() - stall:
            got = f"{unread} tokens unread for {stall:g} s"
            return Refusal("the answer was not read", status=408, code="reader_stalled", got=got), "stalled"
        if reading.left <= 0:
            got, do = f"{reading.sent} tokens in {reading.seconds:g} s", "ask for fewer, or allow a longer timeout"
            return Refusal("the deadline has passed", status=504, code="deadline_exceeded", got=got, do=do), "deadline"
        return None

    def _abandon(self) -> None:
        gone = Refusal("the engine has stopped", status=503, code="engine_stopped", do="restart the server")
        with self._wake:
            actions, self._inbox = self._inbox, []
        for action in actions:  # those who were accepted at the last moment are told as well
            action()
        for reading in {reading for reading, _ in self._clients.values()}:
            self._drop(reading)
            if not reading.loop.is_closed():
                reading.loop.call_soon_threadsafe(self._fail, reading, gone, "error")

    # --- the event loop's thread -----------------------------------------------------------------------------------

    def _fail(self, reading: Reading, why: Refusal, outcome: str) -> None:
        self.metrics.ended[outcome] += len(reading.open)
        reading.open.clear()
        reading.fail(why)

    def _deliver(self, given: Sequence[tuple[Reading, list[tuple[int, Delta]]]], now: float) -> None:
        for reading, items in given:
            for place in sorted({place for place, _ in items}):
                self._measure(reading, place, [delta for n, delta in items if n == place], now)
            reading.deliver(items)

    def _measure(self, reading: Reading, place: int, deltas: Sequence[Delta], now: float) -> None:
        """A step with a draft gives several tokens at once: each took its share of the time since the last."""
        clock, count = reading.clocks[place], sum(delta.token >= 0 for delta in deltas)
        self.metrics.tokens_out += count
        if clock.last is None:
            self.metrics.first.observe(now - clock.began)
        elif count:
            self.metrics.between.observe((now - clock.last) / count, count)
        clock.last = now
        finish = deltas[-1].finish
        if finish and place in reading.open:
            reading.open.discard(place)
            self.metrics.ended[finish] += 1
            self.metrics.whole.observe(now - clock.began)
