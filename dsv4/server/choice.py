"""One answer on its way to a client: tokens in, events of reasoning, content and calls out, streamed or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv4.chat.control import END_THINK
from dsv4.chat.events import ContentDelta, Event, ParseProblem, RawDelta, ToolCallEnd, collect
from dsv4.chat.parse import StreamParser
from dsv4.chat.tokenizer import Tokenizer
from dsv4.engine.request import Delta
from dsv4.server.job import Job

# The engine's reasons in OpenAI's words.
FINISH = {"stop": "stop", "role_token": "stop", "stop_string": "stop", "length": "length", "context": "length"}


class Choice:
    """Feed it the deltas of one request. Streamed and whole answers are made of the same events."""

    def __init__(
        self, index: int, job: Job, tokenizer: Tokenizer, name: str, log: Callable[..., None] | None = None
    ) -> None:
        """`name` makes the ids of calls unique among all answers. `log` is told of the answer when it is whole."""
        self.index, self.job, self.seed = index, job, job.answers[0].seed
        self.events: list[Event] = []
        self.ids: list[int] = []  # all that was sampled
        self.tokens = self.reasoning_tokens = 0
        self.cached = 0  # tokens of the prompt that an earlier request had left
        self.hash: str | None = None  # of the logits behind all tokens, when the answer is whole
        self.finish: str | None = None
        self._ended: str | None = None  # the same in the engine's words
        self._tokenizer, self._log = tokenizer, log
        self._thinking = bool(job.in_reasoning)
        self._end_think = tokenizer.controls[END_THINK]
        self._logprobs: list[dict[str, Any]] = []
        self._parser = None
        if job.in_reasoning is not None:
            self._parser = StreamParser(
                in_reasoning=job.in_reasoning, tools=job.tools, make_id=lambda call: f"call_{name}_{index}_{call}"
            )

    def push(self, delta: Delta) -> list[Event]:
        """The events that a delta makes certain. Raises its error if it brings one."""
        if self.finish is not None:
            return []  # a first call has ended the answer, and the engine was quicker
        if delta.error is not None:
            raise delta.error
        self.tokens += 1
        self.ids.append(delta.token)
        self.cached, self.hash = self.cached + delta.cached, delta.hash
        self._thinking = self._thinking and delta.token != self._end_think
        self.reasoning_tokens += self._thinking
        if delta.trace is not None:
            self._logprobs.append(self._logprob(delta))
        events = self._parsed(delta)
        if delta.finish:
            self.finish, self._ended = FINISH[delta.finish], delta.finish
            if self._log is not None:
                self._log(choice=self.index, answer=self._tokenizer.decode(self.ids), finish=delta.finish)
            if self.job.said is not None:
                self.job.said.keep(self.job.prompt, self.ids)
        if self.job.one_call and ToolCallEnd(0) in events:
            events, self.finish = events[: events.index(ToolCallEnd(0)) + 1], "stop"
        self.events += events
        if self.finish == "stop" and any(isinstance(event, ToolCallEnd) for event in self.events):
            self.finish = "tool_calls"
        return events

    def _parsed(self, delta: Delta) -> list[Event]:
        if self._parser is None:
            return [ContentDelta(delta.text)] if delta.text else []
        return self._parser.feed(delta.text) + (self._parser.finish() if delta.finish else [])

    def logprobs(self) -> list[dict[str, Any]] | None:
        """Entries of the tokens since the last time, one each; None if they were not asked for."""
        if not self.job.answers[0].trace:
            return None
        taken, self._logprobs = self._logprobs, []
        return taken

    def _logprob(self, delta: Delta) -> dict[str, Any]:
        assert delta.trace is not None
        top = [self._entry(candidate.id, candidate.logprob) for candidate in delta.trace.ranking]
        return self._entry(delta.token, delta.trace.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.token_bytes(token)
        return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}

    def message(self) -> dict[str, Any]:
        """The whole answer as an assistant message. A call that was cut is there, with the arguments that came."""
        whole = collect(self.events)
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in whole.calls
        ]
        message: dict[str, Any] = {"role": "assistant", "content": whole.content or (None if calls else "")}
        if whole.reasoning:
            message |= {"reasoning_content": whole.reasoning, "reasoning": whole.reasoning}
        return message | ({"tool_calls": calls} if calls else {})

    def text(self) -> str:
        """The whole answer as a plain text, behind what it echoes."""
        return self.job.echo + collect(self.events).content

    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did: of all that was sampled, the first to be complete."""
        text, wanted = self._tokenizer.decode(self.ids), self.job.answers[0].stop
        hits = [(at + len(stop), at, stop) for stop in wanted if (at := text.find(stop)) >= 0]
        return min(hits)[2] if hits and self._ended == "stop_string" else None

    def unparsed(self) -> dict[str, Any]:
        """Where the model broke its own format: what it was, and the text that is neither answer nor call."""
        problems = [event.what for event in self.events if isinstance(event, ParseProblem)]
        raw = "".join(event.text for event in self.events if isinstance(event, RawDelta))
        return {"unparsed": {"problems": problems, "text": raw}} if problems else {}
