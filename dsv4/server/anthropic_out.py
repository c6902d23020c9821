"""Anthropic's JSON shapes: the events of a stream, and the message that they add up to."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator

from pydantic_core import from_json

from dsv4.chat.events import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from dsv4.errors import DSV4Error
from dsv4.server.choice import Choice
from dsv4.server.refusal import MESSAGES, Refusal, body, refused
from dsv4.server.shapes import Json, again
from dsv4.server.stream import named, pushed
from dsv4.server.worker import Reading

STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Message:
    """One answer on its way out, block by block. A whole message is what its events add up to."""

    def __init__(self, id: str, model: str, choice: Choice, prompt_tokens: int) -> None:
        self.choice, self._prompt_tokens = choice, prompt_tokens
        self._head: Json = {"id": id, "type": "message", "role": "assistant", "model": model}
        self._content: list[Json] = []
        self._arguments: dict[int, str] = {}  # of calls, by their place in the content
        self._open = False

    def start(self) -> Json:
        """The first event. Only the first token tells what of the prompt was there already."""
        empty = self._head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self.usage()}
        return {"type": "message_start", "message": empty}

    def more(self, events: Iterable[Event]) -> Iterator[Json]:
        """What these events of the answer are on the wire, and the last events if it is over."""
        for event in events:
            match event:
                case ReasoningDelta(text):
                    yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                    yield self._add("thinking", "thinking_delta", text)
                case ContentDelta(text):
                    yield from self._begin({"type": "text", "text": ""})
                    yield self._add("text", "text_delta", text)
                case ToolCallStart(_, name, id):
                    yield from self._close()
                    yield from self._begin({"type": "tool_use", "id": id, "name": name, "input": {}})
                    self._arguments[len(self._content) - 1] = ""
                case ToolCallArguments(_, text):
                    self._arguments[len(self._content) - 1] += text
                    yield self._delta({"type": "input_json_delta", "partial_json": text})
                case ToolCallEnd():
                    yield from self._close()
        if self.choice.finish:
            yield from self._close()
            yield {"type": "message_delta", "delta": self._stop(), "usage": self.usage()} | self._ours()
            yield {"type": "message_stop"}

    def whole(self) -> Json:
        """The answer of a request that did not ask for a stream."""
        for _ in self.more(self.choice.events):
            pass
        for n, arguments in self._arguments.items():
            self._content[n]["input"] = _object(arguments)
        return self._head | {"content": self._content} | self._stop() | {"usage": self.usage()} | self._ours()

    def usage(self) -> Json:
        """Token counts. Those that an earlier request had left are not in input_tokens, but beside it."""
        said, cached = self.choice, self.choice.cached
        counts = {"input_tokens": self._prompt_tokens - cached, "cache_read_input_tokens": cached}
        counts |= {"cache_creation_input_tokens": 0, "output_tokens": said.tokens}
        return counts | {"output_tokens_details": {"thinking_tokens": said.reasoning_tokens}}

    def _ours(self) -> Json:
        """What Anthropic's servers do not tell: how to get the answer again, and where its format broke."""
        return again([self.choice]) | self.choice.unparsed()

    def _stop(self) -> Json:
        stop = self.choice.stop_string() if self.choice.finish == "stop" else None
        return {"stop_reason": "stop_sequence" if stop else STOPS[self.choice.finish or ""], "stop_sequence": stop}

    def _begin(self, block: Json) -> Iterator[Json]:
        """Open a block, unless one of its kind is open."""
        if self._open and self._content[-1]["type"] == block["type"]:
            return
        yield from self._close()
        self._open = True
        self._content.append(dict(block))
        yield {"type": "content_block_start", "index": len(self._content) - 1, "content_block": block}

    def _add(self, field: str, kind: str, text: str) -> Json:
        self._content[-1][field] += text
        return self._delta({"type": kind, field: text})

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if not self._open:
            return
        self._open, block = False, self._content[-1]
        if block["type"] == "thinking":
            block["signature"] = _signature(block["thinking"])
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        yield {"type": "content_block_stop", "index": len(self._content) - 1}


def _signature(thinking: str) -> str:
    """Clients send back only reasoning that is signed. Nobody checks it here: whoever asks may say what he likes."""
    return hashlib.blake2b(thinking.encode(), digest_size=16).hexdigest()


def _object(arguments: str) -> Json:
    """Arguments, those of a call that was cut as far as they are certain, as the client reads a stream's."""
    try:
        return dict(from_json(arguments, allow_partial=True)) if arguments else {}
    except ValueError:  # JSON that this reader finds too deep, or half a character
        what = "the model made a call that JSON cannot carry"
        raise Refusal(what, status=500, code="bad_call", do="ask for a stream: it has the text as it is") from None


async def message_events(reading: Reading, message: Message) -> AsyncIterator[str]:
    """The stream."""
    started = False
    try:
        async for _, events in pushed(reading, [message.choice]):
            if not started:
                yield named(message.start())
                started = True
            for said in message.more(events):
                yield named(said)
    except DSV4Error as error:
        yield named(body(refused(error), MESSAGES))
