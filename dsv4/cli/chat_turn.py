"""One answer of a chat while it comes: who gives it, how it is shown, and how Ctrl-C ends it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from rich.console import Console

from dsv4.chat.events import ContentDelta, Event, ParseProblem, collect
from dsv4.cli.chat_talk import Talk
from dsv4.errors import DSV4Error

STOPPED = "stopped"
REASONS = {
    "stop": "end of sentence",
    "role_token": "a token that has no place inside a turn",
    "length": "--max-tokens",
    "context": "--max-context: /clear begins anew, dsv4 chat --max-context N has more room",
    STOPPED: "Ctrl-C",
}


@dataclass
class Turn:
    """What is known of an answer. `ids`: as sampled, where we sampled; `prompt`, `count`: tokens, None if not told."""

    ids: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    finish: str | None = None
    prompt: int | None = None
    count: int | None = None
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    def arrived(self) -> None:
        """Something came."""
        self.first = self.first or time.perf_counter()

    def summary(self) -> str:
        """Tokens, rate and why it ended, on one line."""
        now = time.perf_counter()
        first = self.first or now
        known = f"{self.prompt} + {self.count} tokens, " if self.count is not None and self.prompt is not None else ""
        rate = ""
        if self.count is not None and self.count > 1 and now > first:
            rate = f", then {(self.count - 1) / (now - first):.1f} tokens/s"
        reason = REASONS.get(self.finish or "", self.finish or "the server, without a reason")
        return f"{known}first after {first - self.started:.2f} s{rate}; ended by {reason}"


class Source(Protocol):
    """Who answers."""

    name: str
    blocking: bool  # it waits for others, so Ctrl-C has to break in

    def efforts(self) -> Sequence[str] | None:
        """The efforts that there are, None if that is not known."""

    def answer(self, talk: Talk, text: str, turn: Turn, stopped: Callable[[], bool]) -> Iterator[Event]:
        """What is answered to `text`, noting in `turn` what is known; ends soon after `stopped()` becomes true."""


@contextmanager
def stop_key(at_once: bool) -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C only makes the given function true, so that no step of the model breaks off half-way.

    A second one, or the first if `at_once`, raises KeyboardInterrupt.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed or at_once:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def exchange(talk: Talk, text: str, source: Source, err: Console) -> None:
    """Ask, show the answer as it comes, and keep both; of an answer that never began nothing is kept."""
    turn, aside = Turn(), False
    try:
        with stop_key(source.blocking) as stopped:
            for event in source.answer(talk, text, turn, stopped):
                turn.events.append(event)
                aside = _show(event, aside, err)
            if stopped() and turn.finish is None:
                turn.finish = STOPPED
    except KeyboardInterrupt:
        turn.finish = STOPPED
    except (DSV4Error, OSError):
        if turn.events:  # the error begins on a line of its own
            err.print() if aside else print(flush=True)
        raise
    whole = collect(turn.events)
    content = whole.content + whole.raw
    if aside:
        err.print()
    if content:
        print(flush=True)
        answer = {**whole.message(), "content": content}
        talk.keep(text, answer | ({"token_ids": turn.ids} if turn.ids else {}))
    else:
        err.print("no answer came: this turn is not kept", markup=False)
    err.print(turn.summary(), style="dim", markup=False, soft_wrap=True)


def _show(event: Event, aside: bool, err: Console) -> bool:
    """The answer on stdout, all else dimmed on stderr. `aside`: the last thing shown was no answer; returns the new."""
    if isinstance(event, ContentDelta):
        if aside:
            err.print()
        sys.stdout.write(event.text)
        sys.stdout.flush()
        return False
    text = f" [{event.what}]" if isinstance(event, ParseProblem) else getattr(event, "text", str(event))
    err.print(text, style="dim italic", end="", markup=False, soft_wrap=True)
    return True
