"""OpenAI's JSON shapes of a response: the events of a stream, and the object that they add up to."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from copy import deepcopy
from typing import Any

from dsv4.chat.control import END_THINK
from dsv4.chat.events import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from dsv4.errors import DSV4Error
from dsv4.server.choice import Choice
from dsv4.server.refusal import refused
from dsv4.server.responses_in import ResponsesRequest
from dsv4.server.shapes import Json, again, usage
from dsv4.server.stream import named, pushed
from dsv4.server.worker import Reading

# By type: what begins the names of such items, what is in them before all else, and their one part.
PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
EMPTY: dict[str, Json] = {
    "reasoning": {"summary": [], "content": []},
    "message": {"role": "assistant", "content": []},
    "function_call": {"arguments": ""},
}
PARTS: dict[str, Json] = {
    "reasoning": {"type": "reasoning_text", "text": ""},
    "message": {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
}


def opened(asked: ResponsesRequest, name: str, model: str, fingerprint: str, choice: Choice) -> Json:
    """A response before its first token: what was asked for, as it was understood."""
    sampling = choice.job.answers[0]
    optional = {"description": None, "parameters": None}
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": (asked.reasoning or {}).get("effort"), "summary": None},
        "store": False,  # whatever was asked for: nothing is kept
        "system_fingerprint": fingerprint,
        "temperature": sampling.temperature,
        "text": {"format": (asked.text or {}).get("format") or {"type": "text"}},
        "tool_choice": asked.tool_choice or "auto",
        "tools": [optional | tool | {"strict": tool.get("strict") is True} for tool in asked.tools or ()],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
    }


class Answer:
    """One response on its way out, item by item. A whole response is what its events add up to."""

    def __init__(self, head: Json, name: str, choice: Choice) -> None:
        """`name` makes the ids of items unique among all answers."""
        self.choice, self._name, self._said = choice, name, head
        self._items: list[Json] = head["output"]
        self._open = False
        self._count = 0  # of events
        self._entries: deque[Json] = deque()  # logprobs of tokens that no text was given to
        self._owed = 0  # bytes of text whose tokens have not come yet

    def start(self) -> Iterator[Json]:
        """The first events."""
        yield self._event("response.created", response=self._said)
        yield self._event("response.in_progress", response=self._said)

    def more(self, events: Iterable[Event]) -> Iterator[Json]:
        """What these events of the answer are on the wire, and the last event if it is over."""
        self._entries.extend(self.choice.logprobs() or ())
        for event in events:
            match event:
                case ReasoningDelta(text):
                    yield from self._text("reasoning", text)
                case ContentDelta(text):
                    yield from self._text("message", text)
                case ToolCallStart(_, name, id):
                    yield from self._close()
                    yield from self._begin("function_call", call_id=id, name=name)
                case ToolCallArguments(_, text):
                    self._items[-1]["arguments"] += text
                    yield self._of_item("response.function_call_arguments.delta", delta=text)
                case ToolCallEnd():
                    yield from self._close()
                    self._entries.clear()  # what they spell is no text
        if self.choice.finish:
            yield from self._end()

    def failed(self, error: DSV4Error) -> Json:
        """The last event of an answer that broke off."""
        if self._open:
            self._items[-1]["status"] = "incomplete"
        self._said |= {"status": "failed", "error": {"code": "server_error", "message": str(refused(error))}}
        return self._event("response.failed", response=self._said)

    def whole(self) -> Json:
        """The answer of a request that did not ask for a stream."""
        return self._said

    # --- items -----------------------------------------------------------------------------------------------------

    def _text(self, kind: str, text: str) -> Iterator[Json]:
        """More of the one text of an item, which is opened unless it is open already."""
        fresh = not self._open or self._items[-1]["type"] != kind
        if fresh:
            yield from self._close()
            yield from self._begin(kind)
            self._items[-1]["content"] = [deepcopy(PARTS[kind])]
            yield self._of_part("response.content_part.added", part=PARTS[kind])
        (part,) = self._items[-1]["content"]
        part["text"] += text
        logprobs: list[Json] = []
        if kind == "message":
            logprobs = self._logprobs(text.encode(), fresh)
            part["logprobs"] += logprobs
        yield self._of_text("delta", part, logprobs, delta=text)

    def _begin(self, kind: str, **fields: str) -> Iterator[Json]:
        self._open = True
        item = {"id": f"{PREFIXES[kind]}_{self._name}_{len(self._items)}", "type": kind, "status": "in_progress"}
        self._items.append(item | EMPTY[kind] | fields)
        yield self._of_output("response.output_item.added")

    def _close(self, complete: bool = True) -> Iterator[Json]:
        if not self._open:
            return
        self._open, item = False, self._items[-1]
        if item["type"] == "function_call":
            yield self._of_item("response.function_call_arguments.done", arguments=item["arguments"])
        else:
            (part,) = item["content"]
            yield self._of_text("done", part, part.get("logprobs", []), text=part["text"])
            yield self._of_part("response.content_part.done", part=part)
        item["status"] = "completed" if complete else "incomplete"
        yield self._of_output("response.output_item.done")

    def _end(self) -> Iterator[Json]:
        cut = self.choice.finish == "length"
        broken = bool(self._items) and self._items[-1]["type"] == "function_call"  # if it is open: no call to execute
        yield from self._close(complete=not cut and not broken)
        counts = usage([self.choice], len(self.choice.job.prompt))
        self._said["usage"] = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": counts["completion_tokens_details"],
            "total_tokens": counts["total_tokens"],
        }
        status = "incomplete" if cut else "completed"
        self._said |= {"status": status, "incomplete_details": {"reason": "max_output_tokens"} if cut else None}
        self._said |= again([self.choice]) | self.choice.unparsed()
        yield self._event(f"response.{status}", response=self._said)

    def _logprobs(self, text: bytes, fresh: bool) -> list[Json]:
        """Entries of the tokens that make more of a message's text; marks of the model's format before it have none.

        A token may be longer than what came of it so far: its entry comes with the first of it.
        """
        if fresh:
            begin = self._begin_of(text)
            while self._entries and 0 < begin >= len(self._entries[0]["bytes"]):
                begin -= len(self._entries.popleft()["bytes"])
            self._owed = begin
        self._owed += len(text)
        taken: list[Json] = []
        while self._entries and self._owed > 0:
            taken.append(self._entries.popleft())
            self._owed -= len(taken[-1]["bytes"])
        return taken

    def _begin_of(self, text: bytes) -> int:
        """Where the text of a new message begins in what was sampled since the last call ended, if there was one."""
        sampled = b"".join(bytes(entry["bytes"]) for entry in self._entries)
        if self._items[-2:-1] and self._items[-2]["type"] == "function_call":
            return max(0, sampled.find(text, sampled.find(b">")))  # behind the mark that ends the calls
        mark = END_THINK.encode()
        return sampled.find(mark) + len(mark) if mark in sampled else 0

    # --- events ----------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> Json:
        self._count += 1
        return {"type": kind, "sequence_number": self._count - 1} | fields

    def _of_output(self, kind: str) -> Json:
        return self._event(kind, output_index=len(self._items) - 1, item=self._items[-1])

    def _of_item(self, kind: str, **fields: Any) -> Json:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _of_part(self, kind: str, **fields: Any) -> Json:
        return self._of_item(kind, content_index=0, **fields)

    def _of_text(self, what: str, part: Json, logprobs: list[Json], **fields: str) -> Json:
        more = {"logprobs": logprobs} if "logprobs" in part else {}
        return self._of_part(f"response.{part['type']}.{what}", **fields, **more)


async def response_events(reading: Reading, answer: Answer) -> AsyncIterator[Json]:
    """Of a response from its beginning to its end. They share what they hold: use one before you take the next."""
    for said in answer.start():
        yield said
    async for _, events in pushed(reading, [answer.choice]):
        for said in answer.more(events):
            yield said


async def response_lines(reading: Reading, answer: Answer) -> AsyncIterator[str]:
    """The stream."""
    try:
        async for said in response_events(reading, answer):
            yield named(said)
    except DSV4Error as error:
        yield named(answer.failed(error))
