"""`dsv4 conform` held against servers that get Anthropic's messages wrong: each case catches what it is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from dsv4.check.conform.messages import CASES
from tests.conforming import (
    Change,
    asking,
    breaking,
    caught,
    events,
    other_name,
    passes,
    speaker,
    swap,
    thinker,
    whole,
    with_fault,
)
from tests.serving import Running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with speaker() as server:
        yield server


Json = dict[str, Any]


def of_kind(said: list[Json], kind: str) -> list[Json]:
    """Events of a type, or whose delta is of that type."""
    return [event for event in said if kind in (event["type"], (event.get("delta") or {}).get("type"))]


def without(kind: str) -> Change:
    return events(lambda said: [event for event in said if event not in of_kind(said, kind)])


def twice(kind: str) -> Change:
    return events(lambda said: [one for event in said for one in [event] * (1 + (event in of_kind(said, kind)))])


def moved(kind: str, place: int) -> Change:
    """The first event of a kind somewhere else."""

    def change(said: list[Json]) -> list[Json]:
        found = of_kind(said, kind)[:1]
        rest = [event for event in said if event not in found]
        return [*rest[:place], *found, *rest[place:]]

    return events(change)


def numbered(by: int) -> Change:
    """Blocks are counted from elsewhere."""
    return events(lambda said: [event | ({"index": event["index"] + by} if "index" in event else {}) for event in said])


def interleaved(said: list[Json]) -> list[Json]:
    """The second block begins before the first has stopped."""
    stop = next(n for n, event in enumerate(said) if event["type"] == "content_block_stop")
    return [*said[:stop], said[stop + 1], said[stop], *said[stop + 2 :]]


def answering(**fields: Any) -> Change:
    return whole(lambda tree: tree.update(fields))


def first_block(**fields: Any) -> Change:
    return whole(lambda tree: tree["content"][0].update(fields))


def reversed_blocks(tree: Json) -> None:
    tree["content"].reverse()


def uses(**fields: Any) -> Change:
    return whole(lambda tree: [use.update(fields) for use in tree["content"] if use["type"] == "tool_use"])


def counts_of(count: int) -> Change:
    """All prompts are of one length, wherever it is told."""
    return lambda body: re.sub(rb'"(cache_read_)?input_tokens": ?\d+', rb'"\1input_tokens":%d' % count, body)


def one_more(body: bytes) -> bytes:
    """count_tokens is near, but not right."""
    return re.sub(rb'^\{"input_tokens": ?(\d+)\}$', lambda found: b'{"input_tokens":%d}' % (int(found[1]) + 1), body)


def counting(**fields: Any) -> Change:
    """count_tokens alone reads other values in these fields."""
    return lambda body: body if b"max_tokens" in body else asking(**fields)(body)


BARE = '"type":"error","error"'  # an envelope, and what OpenAI's has in its place
OPENAI: Change = swap(BARE, '"error"')
# Named after what is wrong: how, and the case that has to catch it. `body` changes answers, `asked` what is read.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    # whole answers
    "no role": ({"body": other_name("role")}, "a message"),
    "a type of its own": ({"body": answering(type="chat")}, "a message"),
    "content that is a text": ({"body": answering(content="Hi")}, "a message"),
    "a block of an unknown type": ({"body": first_block(type="output_text")}, "a message"),
    "OpenAI's reason": ({"body": answering(stop_reason="length")}, "a message"),
    "no stop_sequence": ({"body": other_name("stop_sequence")}, "a message"),
    "no usage of a message": ({"body": other_name("usage")}, "a message"),
    "more tokens than asked for": ({"body": swap('"output_tokens":', '"output_tokens":9')}, "a message"),
    "a text after a call": ({"body": swap('"stop_reason":"tool_use"', '"stop_reason":"end_turn"')}, "a tool used"),
    "a call that is not there": ({"body": answering(stop_reason="tool_use")}, "a message"),
    "a prompt of no tokens": ({"body": counts_of(0)}, "a message"),
    "max_tokens ignored": ({"asked": asking(max_tokens=40)}, "a message cut at max_tokens"),
    "end_turn where it was cut": ({"body": answering(stop_reason="end_turn")}, "a message cut at max_tokens"),
    "stop_sequences ignored": ({"asked": asking(stop_sequences=None)}, "stop_sequences"),
    "a stop that nobody asked for": ({"body": answering(stop_sequence="x")}, "stop_sequences"),
    "a stop that is not named": ({"body": answering(stop_reason="end_turn")}, "stop_sequences"),
    "the stop shown": ({"body": first_block(text="hello")}, "stop_sequences"),
    "thinking that is not signed": ({"body": first_block(signature="")}, "thinking"),
    "thinking behind the text": ({"body": whole(reversed_blocks)}, "thinking"),
    "input as a text": ({"body": uses(input='{"city": "Paris"}')}, "a tool used"),
    "one id for all uses": ({"body": uses(id="toolu_1")}, "a tool used"),
    "a tool that nobody has, any": ({"body": uses(name="cold")}, "any tool"),
    "a tool that nobody has, named": ({"body": uses(name="cold")}, "a tool by name"),
    "disable_parallel_tool_use ignored": ({"asked": asking(tool_choice=None)}, "one tool at most"),
    "tool_choice none ignored": ({"asked": asking(tool_choice=None)}, "no tool"),
    # what is asked for is not read
    "blocks that are not read": ({"asked": swap('[{"type": "text", "text": "Say hello."}]', '"Hi"')}, "text in blocks"),
    "system ignored": ({"asked": asking(system=None)}, "a system prompt"),
    "system in blocks ignored": ({"asked": asking(system=None)}, "a system prompt in blocks"),
    "what was begun is not read": ({"body": counts_of(5)}, "an answer that is begun"),
    "nothing more when somebody has left": ({"start": breaking(2)}, "a client that leaves a message"),
    "one length for all prompts": ({"body": counts_of(5)}, "thinking sent back"),
    "a result that is not read": ({"body": counts_of(5)}, "a tool's result"),
    "counts that are near": ({"body": one_more}, "tokens of a message"),
    "counts without system": ({"asked": counting(system=None)}, "tokens with a system prompt"),
    "results in blocks that are not read": (
        {"asked": swap('[{"type": "text", "text": "17 degrees"}]', '"17"')}, "a tool's result in blocks"),
    "counts as a text": ({"body": swap('{"input_tokens":', '{"tokens":')}, "tokens with thinking"),
    "counts without tools": ({"asked": counting(tools=None)}, "tokens with tools"),
    # streams
    "no event names": ({"body": swap("event: ", ": ")}, "a message, streamed"),
    "another event's name": ({"body": swap("event: message_delta", "event: message")}, "a message, streamed"),
    "OpenAI's end": ({"body": lambda body: body + b"data: [DONE]\n\n" if body[:5] == b"event" else body},
                     "a message, streamed"),
    "no message_start": ({"body": without("message_start")}, "a message, streamed"),
    "no message_stop": ({"body": without("message_stop")}, "a message, streamed"),
    "no message_delta": ({"body": without("message_delta")}, "a message, streamed"),
    "an end amid the stream": ({"body": moved("message_delta", 2)}, "a message, streamed"),
    "two starts": ({"body": twice("message_start")}, "a message, streamed"),
    "a block that does not begin": ({"body": without("content_block_start")}, "a message, streamed"),
    "a block that does not stop": ({"body": without("content_block_stop")}, "a message, streamed"),
    "a block that stops twice": ({"body": twice("content_block_stop")}, "a message, streamed"),
    "indices from 1": ({"body": numbered(1)}, "a message, streamed"),
    "a delta twice": ({"body": twice("text_delta")}, "a message, streamed"),
    "a delta lost": ({"body": events(lambda said: [*said[:3], *said[4:]])}, "a message, streamed"),
    "a delta of another kind": ({"body": swap('"type":"text_delta"', '"type":"thinking_delta"')},
                                "a message, streamed"),
    "a block of another type": ({"body": swap('block":{"type":"text"', 'block":{"type":"output_text"')},
                                "a message, streamed"),
    "a block that begins with text": ({"body": swap('"text":""', '"text":"x"')}, "a message, streamed"),
    "content in message_start": ({"body": swap('"content":[]', '"content":[{}]')}, "a message, streamed"),
    "no reason in a stream": ({"body": swap('"stop_reason":"max_tokens"', '"stop_reason":null')},
                              "a message cut at max_tokens, streamed"),
    "no usage at the end": ({"body": events(lambda said: [{k: v for k, v in event.items() if k != "usage"}
                                                          for event in said])},
                            "a message cut at max_tokens, streamed"),
    "another stop in a stream": ({"body": events(lambda said: [
        event | ({"delta": event["delta"] | {"stop_sequence": "x"}} if event["type"] == "message_delta" else {})
        for event in said])}, "stop_sequences, streamed"),
    "no signature_delta": ({"body": without("signature_delta")}, "thinking, streamed"),
    "the signature first": ({"body": moved("signature_delta", 2)}, "thinking, streamed"),
    "blocks that interleave": ({"body": events(interleaved)}, "thinking, streamed"),
    "arguments cut short": ({"body": without("input_json_delta")}, "a tool used, streamed"),
    "arguments twice": ({"body": twice("input_json_delta")}, "a tool used, streamed"),
    "input in the beginning": ({"body": swap('"partial_json":', '"json":')}, "a tool used, streamed"),
    # headers
    "only one anthropic-version": ({"start": lambda start: start.update(status=400)}, "another anthropic-version"),
    "x-api-key unknown": ({"start": lambda start: start.update(status=401)}, "x-api-key"),
}  # fmt: skip


def as_200(start: dict[str, Any]) -> None:
    start["status"] = 200


REFUSED_WRONGLY: list[dict[str, Any]] = [
    {"start": as_200},
    {"body": OPENAI},
    {"body": swap('_error"', '_mistake"')},
    {"body": swap('"message":"', '"message":null,"text":"')},
]
REFUSALS = [case.name for case in CASES if any("refused" in check.__qualname__ for check in case.checks)]
HELD = "json_schema of a message"


def test_every_case_is_shown_to_fail() -> None:
    assert {case for _, case in FAULTS.values()} | set(REFUSALS) | {HELD} == {case.name for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(server: Running, fault: str) -> None:
    changes, case = FAULTS[fault]
    caught(server, case, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_in_another_shape_or_none_is_caught(server: Running, case: str) -> None:
    assert passes(server, case)
    for changes in REFUSED_WRONGLY:
        assert with_fault(server, case, **changes).verdict == "FAIL"


@pytest.mark.slow
def test_a_format_that_is_ignored_is_caught() -> None:
    with thinker() as free:
        assert with_fault(free, HELD).verdict == "pass"
        assert with_fault(free, HELD, asked=asking(output_config=None)).verdict == "FAIL"
