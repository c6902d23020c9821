"""OpenAI's JSON shapes: chunks of a stream, whole answers, token counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4.chat.events import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart
from dsv4.server.choice import Choice

Json = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What every chunk of an answer repeats. `chat`: which of the two endpoints it is for."""

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool

    def wrap(self, choices: Sequence[Json], *, whole: bool = False) -> Json:
        """`choices` as one chunk, or as the whole answer."""
        kind = ("chat.completion" if whole else "chat.completion.chunk") if self.chat else "text_completion"
        said = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return said | {"system_fingerprint": self.fingerprint, "choices": list(choices)}


def first_chunk(head: Head, choice: Choice) -> Iterator[Json]:
    """What comes before any token: the role, or the echo."""
    if head.chat:
        yield head.wrap([_delta(choice, {"role": "assistant", "content": ""})])
    elif choice.job.echo:
        yield head.wrap([_text(choice, choice.job.echo, None)])


def chunks(head: Head, choice: Choice, events: Iterable[Event]) -> Iterator[Json]:
    """One chunk for each event that a client sees, and one that says why the answer ended."""
    for change in filter(None, map(_change, events)):
        yield head.wrap([_part(head, choice, change)])
    if choice.finish:
        last = _part(head, choice, {})
        yield head.wrap([last | {"finish_reason": choice.finish, "logit_hash": choice.hash} | choice.unparsed()])


def _part(head: Head, choice: Choice, change: Json) -> Json:
    entries = choice.logprobs()
    if head.chat:
        logprobs = None if entries is None else {"content": entries}
        return _delta(choice, change) | ({"logprobs": logprobs} if logprobs else {})
    return _text(choice, change.get("content", ""), entries)


def _delta(choice: Choice, change: Json) -> Json:
    return {"index": choice.index, "delta": change, "finish_reason": None}


def _text(choice: Choice, text: str, entries: list[Json] | None) -> Json:
    logprobs = None if entries is None else old_logprobs(entries)
    return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": None}


def _change(event: Event) -> Json | None:
    """An event as a change of the message. Servers disagree on the name of reasoning, so it goes by both."""
    match event:
        case ReasoningDelta(text):
            return {"reasoning_content": text, "reasoning": text}
        case ContentDelta(text):
            return {"content": text}
        case ToolCallStart(index, name, id):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case _:
            return None


def whole_answer(head: Head, choices: Sequence[Choice], prompt_tokens: int) -> Json:
    """The answer of a request that did not ask for a stream."""
    said = head.wrap([_whole(head, choice) for choice in choices], whole=True)
    return said | {"usage": usage(choices, prompt_tokens)} | again(choices)


def again(choices: Sequence[Choice]) -> Json:
    """`seed`: what to send to get the answer again; `logit_hash`: what tells whether it is the same to the last bit.

    Of several answers that is the first's; each has its own hash where its `finish_reason` stands.
    """
    return {"seed": choices[0].seed, "logit_hash": choices[0].hash}


def _whole(head: Head, choice: Choice) -> Json:
    entries = choice.logprobs()
    said: Json = {"index": choice.index, "finish_reason": choice.finish, "logit_hash": choice.hash}
    said |= choice.unparsed()
    if head.chat:
        return said | {"message": choice.message(), "logprobs": None if entries is None else {"content": entries}}
    return said | {"text": choice.text(), "logprobs": None if entries is None else old_logprobs(entries)}


def old_logprobs(entries: Sequence[Json]) -> Json:
    """The form that /v1/completions has for them."""
    offsets, at = [], 0
    for entry in entries:
        offsets.append(at)
        at += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets,
    }


def usage(choices: Sequence[Choice], prompt_tokens: int) -> Json:
    """Token counts: every sampled token counts, the one that ended the answer too; of a prompt, what its first cost."""
    out = sum(choice.tokens for choice in choices)
    said: Json = {"prompt_tokens": prompt_tokens, "completion_tokens": out, "total_tokens": prompt_tokens + out}
    reasoning = sum(choice.reasoning_tokens for choice in choices)
    cached = sum({id(choice.job): choice.cached for choice in reversed(choices)}.values())
    said["prompt_tokens_details"] = {"cached_tokens": cached}
    return said | {"completion_tokens_details": {"reasoning_tokens": reasoning}}
