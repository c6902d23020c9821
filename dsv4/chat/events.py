"""What the parser says, piece by piece, and the message that the pieces add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call of the function `name` begins. `index` counts from 0, `id` is what its result will refer to."""

    index: int
    name: str
    id: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of the call's arguments; all of them joined are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The call is whole. A call without this event must not be executed."""

    index: int


@dataclass(frozen=True)
class ParseProblem:
    """The model broke the format at character `at` of its output.

    `fatal`: what follows is no longer understood and arrives as `RawDelta`. Otherwise the parser mended it and goes on.
    """

    what: str
    at: int
    fatal: bool = True


@dataclass(frozen=True)
class RawDelta:
    """Output after a fatal problem, from the construct that broke, exactly as sampled: neither answer nor call."""

    text: str


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | ParseProblem | RawDelta


@dataclass(frozen=True)
class ToolCall:
    """A call as collected. `complete` False: the output ended or broke inside it."""

    name: str
    id: str
    arguments: str = ""
    complete: bool = False


@dataclass
class Completion:
    """A whole answer taken apart. `raw` is what could not be understood; `problems` say why."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    problems: list[ParseProblem] = field(default_factory=list)
    raw: str = ""

    def message(self) -> dict[str, Any]:
        """As an OpenAI-style assistant message, with the complete calls only; `encode_messages` takes it back."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.calls
            if call.complete
        ]
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message | ({"tool_calls": calls} if calls else {})


def coalesce(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring deltas of one kind joined: two ways of cutting a stream compare equal."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments) and last.index == event.index:
            out[-1] = replace(last, text=last.text + event.text)
        elif isinstance(event, ReasoningDelta | ContentDelta | RawDelta) and type(last) is type(event):
            out[-1] = replace(event, text=last.text + event.text)
        else:
            out.append(event)
    return out


def collect(events: Iterable[Event]) -> Completion:
    """Add the events up."""
    whole = Completion()
    for event in events:
        _add(whole, event)
    return whole


def _add(whole: Completion, event: Event) -> None:
    match event:
        case ReasoningDelta(text):
            whole.reasoning += text
        case ContentDelta(text):
            whole.content += text
        case RawDelta(text):
            whole.raw += text
        case ParseProblem():
            whole.problems.append(event)
        case ToolCallStart(_, name, id):
            whole.calls.append(ToolCall(name, id))
        case ToolCallArguments(index, text):
            call = whole.calls[index]
            whole.calls[index] = replace(call, arguments=call.arguments + text)
        case ToolCallEnd(index):
            whole.calls[index] = replace(whole.calls[index], complete=True)
