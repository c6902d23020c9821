"""The model's text, as it streams, into reasoning, answer and tool calls.

    reasoning --</think>--> content --\\n\\n<｜DSML｜tool_calls>--> block --invoke--> call --parameter--> value
                               ^                                  |  ^             |  ^                |
                               +------------ after <--------------+  +-------------+  +----------------+

Nothing is held back but what may become a mark, up to two newlines before it, and values that are JSON, which wait for
their closing tag to be checked. Text parameters stream. The events do not depend on how the text was cut into pieces.

Text that breaks the grammar is never passed off as answer or arguments: a `ParseProblem` marks the place and the rest
comes as `RawDelta`. Tolerated: the block names `toolcalls` and `tool`, other white space between tags, a parameter
without its string attribute (JSON if it reads as JSON, else text), several blocks, text after a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dsv4.chat import dsml
from dsv4.chat.events import (
    Completion,
    ContentDelta,
    Event,
    ParseProblem,
    RawDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    collect,
)

State = Callable[[], Iterator[Event]]


def default_id(index: int) -> str:
    """Call ids within one answer. A server that keeps conversations passes its own, unique ones."""
    return f"call_{index}"


class StreamParser:
    """Feed the text after the prompt, without the end-of-sentence token; `finish` when it is over.

    `in_reasoning` is `Prompt.in_reasoning`. `tools=False`: none were offered, so a call block is a problem, not a call.
    """

    def __init__(self, *, in_reasoning: bool, tools: bool = True, make_id: Callable[[int], str] = default_id) -> None:
        self._tools, self._make_id = tools, make_id
        self._buffer, self._at = "", 0
        self._calls = -1
        self._parameters: set[str] = set()
        self._is_string: bool | None = None
        self._state: State = self._reasoning if in_reasoning else self._content

    @property
    def held(self) -> str:
        """Text taken in but not yet accounted for by an event."""
        return self._buffer

    def feed(self, text: str) -> list[Event]:
        """Events that became certain with this piece."""
        self._buffer += text
        return list(self._run())

    def finish(self) -> list[Event]:
        """The remaining events: what was held back, and a problem if the output ended inside something."""
        events = list(self._run()) + list(self._end())
        self._buffer = ""
        return events

    def _run(self) -> Iterator[Event]:
        """Steps of the current state until one neither consumes text nor changes the state."""
        before = None
        while before != (self._at, self._state):
            before = (self._at, self._state)
            try:
                yield from self._state()
            except dsml.Broken as e:
                yield from self._give_up(str(e))

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        self._at += count
        return taken

    def _skip_space(self) -> None:
        self._take(len(self._buffer) - len(self._buffer.lstrip()))

    def _give_up(self, why: str) -> Iterator[Event]:
        yield ParseProblem(why, self._at)
        self._state = self._raw

    def _reasoning(self) -> Iterator[Event]:
        end = self._buffer.find(dsml.END_REASONING)
        keep = 0 if end >= 0 else dsml.partial(self._buffer, dsml.END_REASONING)
        text = self._take(end if end >= 0 else len(self._buffer) - keep)
        if text:
            yield ReasoningDelta(text)
        if end >= 0:
            self._take(len(dsml.END_REASONING))
            self._state = self._content

    def _content(self) -> Iterator[Event]:
        mark = dsml.find_mark(self._buffer)
        end = mark if mark >= 0 else len(self._buffer) - dsml.partial(self._buffer, dsml.MARK, dsml.CLOSING_MARK)
        text = self._take(dsml.newlines_before(self._buffer, end))
        if text:
            yield ContentDelta(text)
        if mark >= 0:
            yield from self._open_block()

    def _open_block(self) -> Iterator[Event]:
        newlines = len(self._buffer) - len(self._buffer.lstrip("\n"))
        opening = dsml.expect(self._buffer[newlines:], dsml.BLOCK_OPEN)
        if opening is None:
            return
        if not self._tools:
            raise dsml.Broken("a tool call, though no tools were offered")
        self._take(newlines + len(opening))
        self._state = self._block
        yield from ()

    def _block(self) -> Iterator[Event]:
        self._skip_space()
        found = dsml.expect(self._buffer, (dsml.INVOKE_OPEN, *dsml.BLOCK_CLOSE))
        if found in dsml.BLOCK_CLOSE:
            self._take(len(found or ""))
            self._state = self._after
        elif found and (tag := dsml.read_tag(self._buffer, found)):
            attributes, length = tag
            self._take(length)
            self._calls += 1
            self._parameters.clear()
            self._state = self._call
            yield ToolCallStart(self._calls, attributes["name"], self._make_id(self._calls))

    def _call(self) -> Iterator[Event]:
        self._skip_space()
        found = dsml.expect(self._buffer, (dsml.PARAMETER_OPEN, dsml.INVOKE_CLOSE))
        if found == dsml.INVOKE_CLOSE:
            self._take(len(found))
            self._state = self._block
            yield ToolCallArguments(self._calls, "}" if self._parameters else "{}")
            yield ToolCallEnd(self._calls)
        elif found and (tag := dsml.read_tag(self._buffer, found)):
            yield from self._open_parameter(*tag)

    def _open_parameter(self, attributes: dict[str, str], length: int) -> Iterator[Event]:
        name, self._is_string = attributes["name"], dsml.is_string(attributes)
        if name in self._parameters:
            raise dsml.Broken(f"parameter {name!r} given twice")
        self._take(length)
        opening = ", " if self._parameters else "{"
        self._parameters.add(name)
        self._state = self._text_value if self._is_string else self._json_value
        yield ToolCallArguments(self._calls, f'{opening}"{dsml.escaped(name)}": ' + ('"' if self._is_string else ""))

    def _text_value(self) -> Iterator[Event]:
        end = self._buffer.find(dsml.PARAMETER_CLOSE)
        keep = 0 if end >= 0 else dsml.partial(self._buffer, dsml.PARAMETER_CLOSE)
        text = dsml.escaped(self._take(end if end >= 0 else len(self._buffer) - keep))
        if end >= 0:
            self._take(len(dsml.PARAMETER_CLOSE))
            self._state = self._call
            text += '"'
        if text:
            yield ToolCallArguments(self._calls, text)

    def _json_value(self) -> Iterator[Event]:
        end = self._buffer.find(dsml.PARAMETER_CLOSE)
        if end < 0:
            return
        at, value = self._at, self._take(end)
        self._take(len(dsml.PARAMETER_CLOSE))
        self._state = self._call
        valid = dsml.is_json(value)
        if not valid and self._is_string is False:
            yield ParseProblem(f"a value marked as JSON is none, taken as text: {value[:40]!r}", at, fatal=False)
        yield ToolCallArguments(self._calls, value if valid else f'"{dsml.escaped(value)}"')

    def _after(self) -> Iterator[Event]:
        self._skip_space()
        if self._buffer:
            self._state = self._content
        yield from ()

    def _raw(self) -> Iterator[Event]:
        if self._buffer:
            yield RawDelta(self._take(len(self._buffer)))

    def _end(self) -> Iterator[Event]:
        """A whole mark at the end of content was held for a block that never came; anything shorter is content."""
        rest = self._buffer
        if self._state == self._reasoning:
            if rest:
                yield ReasoningDelta(rest)
            yield ParseProblem("the output ended inside the reasoning", self._at + len(rest), fatal=False)
        elif self._state == self._content and dsml.MARK not in rest:
            if rest:
                yield ContentDelta(rest)
        elif self._state not in (self._after, self._raw):
            yield from self._give_up("the output ended inside a tool call")
            yield from self._raw()


def parse_completion(text: str, *, in_reasoning: bool, tools: bool = True) -> Completion:
    """A whole answer at once, by the same machine."""
    parser = StreamParser(in_reasoning=in_reasoning, tools=tools)
    return collect(parser.feed(text) + parser.finish())
