"""What a case may demand of an answer. Each check raises `Wrong` with what it got and wanted, or `Unclear`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from dsv4.check.wire import data

Json = dict[str, Any]
FINISH = ("stop", "length", "tool_calls", "content_filter", "function_call")


class Wrong(Exception):
    """The answer is not what the protocol wants."""

    def __init__(self, got: object, wanted: object) -> None:
        self.got, self.wanted = " ".join(str(got).split())[:200], str(wanted)
        super().__init__(f"got {self.got}; wanted {self.wanted}")


class Unclear(Exception):
    """The model did not do what the case needs."""


@dataclass
class Got:
    """One answer: raw lines of the body, and what they hold. `asked`: the request. `before`: the answer of the case
    that this one comes after.
    """

    status: int
    headers: Mapping[str, str]
    lines: Sequence[bytes]
    asked: Json = field(default_factory=dict)
    before: Got | None = None

    @property
    def tree(self) -> Json:
        """The body as a JSON object."""
        return parsed(b"\n".join(self.lines))

    @property
    def streamed(self) -> bool:
        """Whether it is an event stream."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def earlier(self) -> Got:
        """The answer before this one, of a case that comes after another."""
        assert self.before is not None
        return self.before

    @property
    def events(self) -> list[bytes]:
        """What the data lines of a stream carry."""
        return [value for value in map(data, self.lines) if value is not None]

    @property
    def chunks(self) -> list[Json]:
        """The objects of a stream, [DONE] not among them."""
        return [parsed(value) for value in self.events if value != b"[DONE]"]


Check = Callable[[Got], None]


def want(good: object, got: object, wanted: object) -> None:
    """Wrong unless `good`."""
    if not good:
        raise Wrong(got, wanted)


def parsed(text: bytes) -> Json:
    """A JSON object. Wrong if it is none."""
    try:
        tree = json.loads(text.decode())
    except UnicodeDecodeError:
        raise Wrong(repr(text[:60]), "UTF-8 that is not cut inside a character") from None
    except (ValueError, RecursionError):
        raise Wrong(repr(text[:60]), "a JSON object") from None
    want(isinstance(tree, dict), repr(tree)[:60], "a JSON object")
    return tree  # type: ignore[no-any-return]


def at(tree: Any, path: str) -> Any:
    """`choices.0.message` of a tree; Wrong if it is not there."""
    for part in path.split("."):
        try:
            tree = tree[int(part) if part.isdecimal() else part]
        except (LookupError, TypeError):
            raise Wrong(f"no {path}", f"{path}") from None
    return tree


def fields(tree: Any, wanted: Mapping[str, type]) -> None:
    """Fields that an object must have, each of its type."""
    for name, kind in wanted.items():
        value = at(tree, name)
        want(
            isinstance(value, kind) and not (kind is int and isinstance(value, bool)),
            f"{name} {value!r}",
            f"{name}, {kind.__name__}",
        )


def ok(got: Got) -> None:
    """Status 200 and no error inside."""
    want(got.status == 200, f"status {got.status}: {b' '.join(got.lines).decode(errors='replace')[:120]}", "status 200")


def has(path: str, wanted: object) -> Check:
    """A value at a path of the JSON: equal to `wanted`, of that type, or one of that tuple."""

    def check(got: Got) -> None:
        value = at(got.tree, path)
        kind, some = isinstance(wanted, type), isinstance(wanted, tuple)
        good = isinstance(value, wanted) if kind else value in wanted if some else value == wanted  # type: ignore[arg-type, operator]
        want(good, f"{path} {value!r}", wanted.__name__ if kind else wanted)  # type: ignore[attr-defined]

    return check


def usage(got: Got) -> None:
    """Counts that add up, and as many tokens as may be."""
    counted(at(got.tree, "usage"), got.asked)


def counted(said: Json, asked: Json) -> None:
    """As `usage`, of its object."""
    counts = [at(said, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    good = all(type(count) is int and count > 0 for count in counts) and counts[0] + counts[1] == counts[2]
    want(good, f"usage {counts}", "whole numbers above 0, prompt + completion = total")
    limit = asked.get("max_tokens", 1 << 31) * asked.get("n", 1)
    want(counts[1] <= limit, f"{counts[1]} completion_tokens", f"at most {limit}")


def finishes(*reasons: str) -> Check:
    """Every choice of a whole answer ends for one of these reasons."""

    def check(got: Got) -> None:
        for choice in at(got.tree, "choices"):
            want(choice.get("finish_reason") in reasons, f"finish_reason {choice.get('finish_reason')!r}", reasons)

    return check


def error(*statuses: int) -> Check:
    """An error in OpenAI's shape, with one of these statuses."""

    def check(got: Got) -> None:
        want(got.status in statuses, f"status {got.status}", " or ".join(map(str, statuses)))
        want(isinstance(at(got.tree, "error.message"), str), at(got.tree, "error.message"), "error.message, a text")
        want(isinstance(at(got.tree, "error.type"), str), at(got.tree, "error.type"), "error.type, a text")

    return check


def framed(got: Got) -> None:
    """An event stream: its content type, data lines that are whole UTF-8 JSON, [DONE] once and last."""
    kind = got.headers.get("content-type", "")
    want(kind.split(";")[0].strip() == "text/event-stream", f"content-type {kind!r}", "text/event-stream")
    events = got.events
    want(events and events[-1] == b"[DONE]", f"last event {repr(events[-1][:60]) if events else 'none'}", "[DONE]")
    want(events.count(b"[DONE]") == 1, f"{events.count(b'[DONE]')} [DONE]", "one")
    for chunk in got.chunks:
        want("error" not in chunk, chunk.get("error"), "no error in the stream")
    for line in got.lines:
        field_name = line.partition(b":")[0]
        want(field_name in (b"", b"data", b"event", b"id", b"retry"), repr(line[:60]), "lines of an event stream")


def one_end(got: Got) -> None:
    """Each choice ends once, and nothing of it comes after that."""
    ended: dict[int, str] = {}
    for choice in parts(got):
        index = choice.get("index", 0)
        want(index not in ended, f"a chunk of choice {index} after its finish_reason", "none")
        if choice.get("finish_reason") is not None:
            want(choice["finish_reason"] in FINISH, f"finish_reason {choice['finish_reason']!r}", FINISH)
            ended[index] = choice["finish_reason"]
    want(set(ended) == set(range(got.asked.get("n", 1))), f"ends of choices {sorted(ended)}", "one of each choice")


def parts(got: Got) -> Iterator[Json]:
    """The choices of all chunks in their order."""
    for chunk in got.chunks:
        yield from at(chunk, "choices")


def role_first(got: Got) -> None:
    """A chat stream begins with the role."""
    first = next(parts(got), {})
    want(first.get("delta", {}).get("role") == "assistant", f"first delta {first.get('delta')}", "role assistant")


def usage_last(got: Got) -> None:
    """Token counts come once, in a last chunk without choices."""
    said = [chunk for chunk in got.chunks if chunk.get("usage")]
    want(said, "no usage", "usage in the last chunk")
    want(said[-1]["choices"] == [], f"choices {said[-1]['choices']}", "a last chunk without choices")
    counted(said[-1]["usage"], got.asked)


def same_head(got: Got) -> None:
    """All chunks bear one id and say what they are."""
    ids = {chunk.get("id") for chunk in got.chunks}
    want(len(ids) == 1 and None not in ids, f"ids {ids}", "one id in all chunks")
    kinds = {chunk.get("object") for chunk in got.chunks}
    want(
        len(kinds) == 1 and kinds <= {"chat.completion.chunk", "text_completion"}, f"object {kinds}", "that of a chunk"
    )


def logprobs(got: Got) -> None:
    """One entry a token: a token, its bytes, a logarithm of at most 0, and the asked-for runners-up."""
    for entry in at(got.tree, "choices.0.logprobs.content") or [{}]:
        value = at(entry, "logprob")
        want(isinstance(value, int | float) and value <= 0, f"logprob {value!r}", "a number of at most 0")
        want(len(at(entry, "top_logprobs")) == got.asked["top_logprobs"], entry["top_logprobs"], "as many as asked for")
        want(isinstance(at(entry, "token"), str) and "bytes" in entry, entry, "token and bytes")


def calls(message: Json) -> list[Json]:
    """The calls of a message, each of the right shape. Unclear if there are none."""
    found = message.get("tool_calls") or []
    if not found:
        raise Unclear("the model did not call")
    for call in found:
        want(call.get("type") == "function" and call.get("id"), call, "an id and type function")
        whole(at(call, "function.arguments"))
    return found


def whole(arguments: Any) -> None:
    """Arguments are the text of a JSON object."""
    want(isinstance(arguments, str), repr(arguments)[:60], "arguments as a text")
    parsed(arguments.encode())


def called(got: Got) -> None:
    """A whole answer with calls."""
    choice = at(got.tree, "choices.0")
    if choice["finish_reason"] == "length":
        raise Unclear("the answer was cut at max_tokens")
    found = calls(choice["message"])
    want(choice["finish_reason"] in ("tool_calls", "stop"), choice["finish_reason"], "tool_calls")
    want(len({call["id"] for call in found}) == len(found), [call["id"] for call in found], "an id for each call")
    if got.asked.get("parallel_tool_calls") is False:
        want(len(found) == 1, f"{len(found)} calls", "one")


def call_deltas(got: Got) -> None:
    """Streamed calls: id and name first, arguments that assemble to JSON."""
    made: dict[int, Json] = {}
    for choice in parts(got):
        for call in choice.get("delta", {}).get("tool_calls") or ():
            index, function = at(call, "index"), call.get("function") or {}
            if index not in made:
                made[index] = {"id": call.get("id"), "type": "function", "function": {"arguments": ""} | function}
                want(call.get("id") and function.get("name"), call, "id and name in a call's first delta")
            else:
                made[index]["function"]["arguments"] += function.get("arguments") or ""
        if choice.get("finish_reason") == "length":
            raise Unclear("the answer was cut at max_tokens")
    calls({"tool_calls": list(made.values())})


def json_content(got: Got) -> None:
    """The content is JSON that is an object."""
    choice = at(got.tree, "choices.0")
    if choice.get("finish_reason") == "length":
        raise Unclear("the answer was cut at max_tokens")
    parsed((choice["message"].get("content") or "").encode())


def json_kind(got: Got) -> None:
    """It also has the schema's keys."""
    json_content(got)
    of_schema(at(got.tree, "choices.0.message.content"))


def of_schema(text: str) -> None:
    """A text that is JSON of the cases' one schema."""
    tree = parsed(text.encode())
    want(set(tree) == {"city", "warm"} and isinstance(tree["warm"], bool), tree, 'a "city" and a boolean "warm"')


def named(got: Got) -> None:
    """A stream of typed events (Responses, Messages), each of which bears its type as its name, and no [DONE]."""
    want(got.streamed, f"content-type {got.headers.get('content-type')!r}", "text/event-stream")
    want(b"[DONE]" not in got.events, "[DONE]", "typed events alone")
    kinds = [str(chunk.get("type")) for chunk in got.chunks]
    names = [line[6:].strip().decode() for line in got.lines if line.startswith(b"event:")]
    other = next((pair for pair in zip_longest(names, kinds) if pair[0] != pair[1]), None)
    want(
        other is None,
        f"an event named {other and other[0]} of type {other and other[1]}",
        "each event's type as its name",
    )
