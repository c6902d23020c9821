"""Shows one answer as it comes: streamed text, a trace of its first steps, or one JSON object at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console

from dsv4.chat.events import Completion, ContentDelta, Event, ParseProblem, RawDelta, collect
from dsv4.chat.parse import StreamParser
from dsv4.engine.request import Delta
from dsv4.llm import LLM

REASONS = {
    "stop": "end of sentence",
    "role_token": "a token that has no place inside a turn",
    "stop_string": "stop string",
    "length": "--max-tokens",
    "context": "--max-context",
}


class Answer:
    """One run, over a prompt of so many tokens. `in_reasoning` None: raw text, shown as it is."""

    def __init__(
        self, llm: LLM, prompt: int, in_reasoning: bool | None, traced: bool, err: Console, as_json: bool
    ) -> None:
        self.llm, self.prompt, self.traced, self.err, self.as_json = llm, prompt, traced, err, as_json
        self.parser = None if in_reasoning is None else StreamParser(in_reasoning=in_reasoning, tools=False)
        self.deltas: list[Delta] = []
        self.events: list[Event] = []
        self.started = self.first = self.ended = 0.0
        self.aside = False  # the last thing shown was no answer: the next one begins on a new line

    def run(self, deltas: Iterable[Delta]) -> None:
        """Show the deltas as they are made, and report."""
        self.started = time.perf_counter()
        for delta in deltas:
            self.first = self.first or time.perf_counter()
            self.deltas.append(delta)
            self._show(self._parse(delta))
            if delta.trace and not self.as_json:
                self.err.print(_trace_line(len(self.deltas), delta, self.llm), markup=False, soft_wrap=True)
        self.ended = time.perf_counter()
        if self.as_json:
            print(json.dumps(self._report(), ensure_ascii=False))
            return
        if self.traced:
            self._write(self.events)
        print(flush=True)
        if self.aside:
            self.err.print()
        self.err.print(self._summary(), style="dim", markup=False, soft_wrap=True)

    def _parse(self, delta: Delta) -> list[Event]:
        if self.parser is None:
            events: list[Event] = [RawDelta(delta.text)] if delta.text else []
        else:
            events = self.parser.feed(delta.text) + (self.parser.finish() if delta.finish else [])
        self.events += events
        return events

    def _show(self, events: Iterable[Event]) -> None:
        if not self.as_json and not self.traced:
            self._write(events)

    def _write(self, events: Iterable[Event]) -> None:
        """Answer and raw text on stdout, all else dimmed on stderr."""
        for event in events:
            if isinstance(event, ContentDelta) or (isinstance(event, RawDelta) and self.parser is None):
                if self.aside:
                    self.err.print()
                self.aside = False
                print(event.text, end="", flush=True)  # with no standard output this is silence, and no error
                continue
            text = f" [{event.what}]" if isinstance(event, ParseProblem) else getattr(event, "text", str(event))
            self.err.print(text, style="dim italic", end="", markup=False, soft_wrap=True)
            self.aside = True

    def _summary(self) -> str:
        count = len(self.deltas)
        seconds = self.ended - self.first
        rate = f"{(count - 1) / seconds:.1f} tokens/s" if count > 1 and seconds > 0 else "one token"
        finish = self.deltas[-1].finish or ""
        engine = self.llm.engine
        drafted = f" ({engine.confirmed} of {engine.drafted} guesses kept)" if engine.drafted else ""
        return (
            f"{self.prompt} + {count} tokens, first after {self.first - self.started:.2f} s, then {rate}{drafted};"
            f" stopped by {REASONS.get(finish, finish)}"
        )

    def _report(self) -> dict[str, Any]:
        whole: Completion = collect(self.events)
        seconds = self.ended - self.first
        return {
            "message": whole.message() if self.parser else None,
            "raw": whole.raw or None,
            "problems": [asdict(problem) for problem in whole.problems],
            "finish": self.deltas[-1].finish,
            "prompt_tokens": self.prompt,
            "completion_tokens": len(self.deltas),
            "token_ids": [delta.token for delta in self.deltas],
            "first_token_seconds": round(self.first - self.started, 4),
            "tokens_per_second": round((len(self.deltas) - 1) / seconds, 2) if seconds > 0 else None,
            "draft": {"guessed": self.llm.engine.drafted, "kept": self.llm.engine.confirmed},
            "trace": [self._traced(delta) for delta in self.deltas if delta.trace],
            "model": dict(self.llm.resolved.facts),
            "started": self.llm.started.as_json(),
        }

    def _traced(self, delta: Delta) -> dict[str, Any]:
        assert delta.trace is not None
        decode = self.llm.tokenizer.decode
        ranking = [asdict(candidate) | {"token": decode([candidate.id])} for candidate in delta.trace.ranking]
        return asdict(delta.trace) | {"id": delta.token, "token": decode([delta.token]), "ranking": ranking}


def _trace_line(step: int, delta: Delta, llm: LLM) -> str:
    """`step  token  id  probability  entropy | runner-ups`, turn-end tokens marked."""
    assert delta.trace is not None
    tokenizer = llm.tokenizer

    def shown(id: int) -> str:
        ends = id == tokenizer.eos_id or id in tokenizer.role_ids
        return json.dumps(tokenizer.decode([id]), ensure_ascii=False) + (" ◀ turn end" if ends else "")

    others = [c for c in delta.trace.ranking if c.id != delta.token][:3]
    runners = "  ".join(f"{shown(c.id)} {c.probability:.3f}" for c in others)
    return (
        f"{step:4} {shown(delta.token):<24} {delta.token:>6}  p {delta.trace.probability:.3f}"
        f"  entropy {delta.trace.entropy:5.2f} | {runners}"
    )
