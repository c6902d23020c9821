"""`dsv4 conform` held against servers that get OpenAI's responses wrong: each case catches what it is for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dsv4.check.conform.responses import CASES
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

Json = dict[str, Any]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with speaker() as server:
        yield server


def recounted(change: Callable[[list[Json]], list[Json]]) -> Change:
    """Events changed and numbered anew: the numbers are not what is wrong."""
    return events(lambda said: [event | {"sequence_number": n} for n, event in enumerate(change(said))])


def without(kind: str) -> Change:
    return recounted(lambda said: [event for event in said if event["type"] != f"response.{kind}"])


def twice(kind: str) -> Change:
    return recounted(
        lambda said: [one for event in said for one in [event] * (1 + (event["type"] == f"response.{kind}"))]
    )


def early(kind: str) -> Change:
    """The first event of a kind one place before its own."""

    def change(said: list[Json]) -> list[Json]:
        at = next(n for n, event in enumerate(said) if event["type"] == f"response.{kind}")
        return [*said[: at - 1], said[at], said[at - 1], *said[at + 1 :]]

    return recounted(change)


def in_event(kind: str, **fields: Any) -> Change:
    """Other values in all events of a kind."""
    return events(lambda said: [event | (fields if event["type"] == f"response.{kind}" else {}) for event in said])


def in_response(kind: str, **fields: Any) -> Change:
    """Other values in the response that an event of a kind has."""
    return events(
        lambda said: [
            event | ({"response": event["response"] | fields} if event["type"] == f"response.{kind}" else {})
            for event in said
        ]
    )


def answering(**fields: Any) -> Change:
    return whole(lambda tree: tree.update(fields) if tree.get("object") == "response" else None)


def of_items(kind: str, **fields: Any) -> Change:
    return whole(lambda tree: [item.update(fields) for item in tree["output"] if item["type"] == kind])


def of_usage(**fields: Any) -> Change:
    return whole(lambda tree: tree["usage"].update(fields))


def one_length(body: bytes) -> bytes:
    """All prompts are of one length, wherever it is told, and the sums are right."""
    counts = re.compile(rb'"input_tokens": ?\d+,(.*?)"output_tokens": ?(\d+),(.*?)"total_tokens": ?\d+')
    return counts.sub(
        lambda found: (
            b'"input_tokens":5,%b"output_tokens":%b,%b"total_tokens":%d'
            % (found[1], found[2], found[3], 5 + int(found[2]))
        ),
        body,
    )


def second_first(tree: Json) -> None:
    tree["output"].reverse()


def not_told(body: bytes) -> bytes:
    """An error that does not say of what."""
    return body.replace(b"previous_response_id", b"field")


def pretending(start: dict[str, Any]) -> None:
    start["status"] = 200


def broken(start: dict[str, Any]) -> None:
    """What ought to be refused is the server's fault."""
    start["status"] = 500 if start["status"] == 400 else start["status"]


STREAM, CALL = "a response, streamed", "a function call, streamed"
# Named after what is wrong: how, and the case that has to catch it. `body` changes answers, `asked` what is read.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing more when somebody has left": ({"start": breaking(2)}, "a client that leaves a response"),
    # whole answers
    "another object": ({"body": answering(object="chat.completion")}, "a response"),
    "no output": ({"body": other_name("output")}, "a response"),
    "a status of its own": ({"body": answering(status="done")}, "a response"),
    "an error beside an answer": ({"body": answering(error={})}, "a response"),
    "details of what is complete": ({"body": answering(incomplete_details={"reason": "x"})}, "a response"),
    "an item of a type of its own": ({"body": of_items("reasoning", type="thinking")}, "a response"),
    "an item without a name": ({"body": swap('"id":"msg_', '"name":"msg_')}, "a response"),
    "one name for all items": ({"body": whole(lambda tree: [item.update(id="x") for item in tree["output"]])},
                               "a response"),
    "a chat's parts": ({"body": swap('"output_text"', '"text"')}, "a response"),
    "no annotations": ({"body": other_name("annotations")}, "a response"),
    "a total that is no sum": ({"body": of_usage(total_tokens=1)}, "a response"),
    "a chat's counts": ({"body": swap('"input_tokens"', '"prompt_tokens"')}, "a response"),
    "more tokens than asked for": ({"body": of_usage(output_tokens=1000, total_tokens=1007)}, "a response"),
    "more cached than there are": ({"body": of_usage(input_tokens_details={"cached_tokens": 1000})}, "a response"),
    "more reasoning than there is": ({"body": of_usage(output_tokens_details={"reasoning_tokens": 1000})},
                                     "a response"),
    "max_output_tokens ignored": ({"asked": asking(max_output_tokens=40)}, "cut at max_output_tokens"),
    "completed where it was cut": ({"body": answering(status="completed", incomplete_details=None)},
                                   "cut at max_output_tokens"),
    "a chat's reason": ({"body": answering(incomplete_details={"reason": "length"})}, "cut at max_output_tokens"),
    "a cut item that is complete": ({"body": of_items("message", status="completed")}, "cut at max_output_tokens"),
    "reasoning behind its text": ({"body": whole(second_first)}, "reasoning"),
    "reasoning of no text": ({"body": of_items("reasoning", content=[])}, "reasoning"),
    "reasoning that is not counted": ({"body": of_usage(output_tokens_details={"reasoning_tokens": 0})}, "reasoning"),
    "a summary of another type": ({"body": of_items("reasoning", summary=[{"type": "text"}])}, "reasoning"),
    "parts of reasoning of another type": ({"body": swap('"reasoning_text"', '"text"')}, "reasoning"),
    "reasoning all the same": ({"asked": asking(reasoning=None)}, "without reasoning"),
    "arguments that are no JSON": ({"body": of_items("function_call", arguments="{")}, "a function call"),
    "arguments that are no text": ({"body": of_items("function_call", arguments={})}, "a function call"),
    "a call without call_id": ({"body": other_name("call_id")}, "a function call"),
    "one call_id for all": ({"body": of_items("function_call", call_id="call_1")}, "a function call"),
    "a call that is not complete": ({"body": of_items("function_call", status="in_progress")}, "a function call"),
    "a function that nobody has": ({"body": of_items("function_call", name="cold")}, "a function call required"),
    "another function than named": ({"body": of_items("function_call", name="cold")}, "a function call by name"),
    "parallel_tool_calls ignored": ({"asked": asking(parallel_tool_calls=None)}, "one function call at most"),
    "tool_choice none ignored": ({"asked": asking(tool_choice=None)}, "no function call"),
    # what is asked for is not read
    "items that are not read": (
        {"asked": swap('[{"role": "user", "content": "Say hello."}]', '"Hi"')}, "input as items"),
    "parts that are not read": (
        {"asked": swap('[{"type": "input_text", "text": "Say hello."}]', '"Hi"')}, "input in parts"),
    "instructions ignored": ({"body": one_length}, "instructions"),
    "instructions not told": ({"body": other_name("instructions")}, "instructions"),
    "a developer ignored": ({"body": one_length}, "a developer's message"),
    "metadata lost": ({"body": other_name("metadata")}, "metadata"),
    "history ignored": ({"body": one_length}, "items sent back"),
    "an output ignored": ({"body": one_length}, "a function's output"),
    "an output in parts that is not read": (
        {"asked": swap('[{"type": "input_text", "text": "17 degrees"}]', '"17"')}, "a function's output in parts"),
    "previous_response_id ignored": ({"asked": asking(previous_response_id=None)}, "previous_response_id"),
    "an unknown one ignored": ({"asked": asking(previous_response_id=None)}, "an unknown previous_response_id"),
    "an error of its own": ({"start": broken}, "previous_response_id"),
    "an error that does not name it": ({"body": not_told}, "previous_response_id"),
    "entries that make another text": ({"body": swap('"bytes":[', '"bytes":[65,')}, "logprobs of a response"),
    "a probability above 1": ({"body": swap('"logprob":', '"logprob":1,"x":')}, "logprobs of a response"),
    "entries without tokens": ({"body": other_name("token")}, "logprobs of a response"),
    "runners-up fewer than asked for": ({"asked": asking(top_logprobs=1)}, "logprobs of a response"),
    # streams
    "no event names": ({"body": swap("event: ", ": ")}, STREAM),
    "a chat's end": ({"body": lambda body: body + b"data: [DONE]\n\n" if body[:5] == b"event" else body}, STREAM),
    "numbers from 1": ({"body": events(lambda said: [event | {"sequence_number": n} for n, event in
                                                     enumerate(said, 1)])}, STREAM),
    "a number left out": ({"body": events(lambda said: [event | {"sequence_number": n + (n > 4)} for n, event in
                                                        enumerate(said)])}, STREAM),
    "no beginning": ({"body": without("created")}, STREAM),
    "complete from the start": ({"body": in_response("created", status="completed")}, STREAM),
    "output from the start": ({"body": in_response("in_progress", output=[{}])}, STREAM),
    "no end": ({"body": without("completed")}, STREAM),
    "two ends": ({"body": twice("completed")}, STREAM),
    "an end amid the stream": ({"body": early("completed")}, STREAM),
    "an end that says otherwise": ({"body": in_response("completed", status="incomplete")}, STREAM),
    "an item that is not added": ({"body": without("output_item.added")}, STREAM),
    "an item that is not done": ({"body": without("output_item.done")}, STREAM),
    "an item done twice": ({"body": twice("output_item.done")}, STREAM),
    "an item that becomes another": ({"body": in_event("output_item.added", item={"id": "x"})}, STREAM),
    "an item that ends as another": ({"body": in_event("output_item.done", item={"id": "x"})}, STREAM),
    "a part that is not added": ({"body": without("content_part.added")}, STREAM),
    "a part that is not done": ({"body": without("content_part.done")}, STREAM),
    "a part of another text": ({"body": in_event("content_part.done", part={"type": "output_text", "text": "x"})},
                               STREAM),
    "a text that is not done": ({"body": without("output_text.done")}, STREAM),
    "a text done twice": ({"body": twice("output_text.done")}, STREAM),
    "a delta twice": ({"body": twice("output_text.delta")}, STREAM),
    "no deltas": ({"body": without("output_text.delta")}, STREAM),
    "a done of another text": ({"body": in_event("output_text.done", text="x")}, STREAM),
    "text before its part": ({"body": early("output_text.delta")}, STREAM),
    "another item's name": ({"body": in_event("output_text.delta", item_id="msg_0")}, STREAM),
    "another item's place": ({"body": in_event("output_text.delta", output_index=0)}, STREAM),
    "an end without its output": ({"body": in_response("completed", output=[])}, STREAM),
    "other counts than the whole answer's": (
        {"body": events(lambda said: [*said[:-1], said[-1] | {"response": said[-1]["response"] | {"usage":
            said[-1]["response"]["usage"] | {"output_tokens": 1,
            "total_tokens": 1 + said[-1]["response"]["usage"]["input_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0}}}}])}, STREAM),
    "complete where it was cut": (
        {"body": in_response("incomplete", status="completed")}, "cut at max_output_tokens, streamed"),
    "no reason at the end": (
        {"body": in_response("incomplete", incomplete_details=None)}, "cut at max_output_tokens, streamed"),
    "reasoning without deltas": ({"body": without("reasoning_text.delta")}, "reasoning, streamed"),
    "arguments without deltas": ({"body": without("function_call_arguments.delta")}, CALL),
    "arguments that are not done": ({"body": without("function_call_arguments.done")}, CALL),
    "arguments from the start": ({"body": swap('"arguments":""', '"arguments":"{"')}, CALL),
    "arguments twice": ({"body": twice("function_call_arguments.delta")}, CALL),
}  # fmt: skip

REFUSALS = [case.name for case in CASES if case.checks[0].__qualname__.startswith("error.")]
HELD = {"json_object of a response", "json_schema of a response"}


def test_every_case_is_shown_to_fail() -> None:
    assert {case for _, case in FAULTS.values()} | set(REFUSALS) | HELD == {case.name for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(server: Running, fault: str) -> None:
    changes, case = FAULTS[fault]
    caught(server, case, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_in_another_shape_or_none_is_caught(server: Running, case: str) -> None:
    assert passes(server, case)
    for changes in ({"start": pretending}, {"body": other_name("error")}, {"body": other_name("type")}):
        assert with_fault(server, case, **changes).verdict == "FAIL"


@pytest.mark.parametrize(
    ("earlier", "verdict"),
    [({}, "FAIL"), ({"previous_response_id": None}, "FAIL"), ({"usage": {"input_tokens": 99}}, "pass")],
)
def test_a_server_that_keeps_responses_is_held_to_it(server: Running, earlier: Json, verdict: str) -> None:
    """It has to say what it went on from, and to have read it."""
    answered: list[str] = []

    def keeping(tree: Json) -> None:
        if "error" in tree and tree.get("object") != "response":
            kept = {"previous_response_id": answered[0], "usage": {"input_tokens": 1}} | earlier
            tree.clear()
            tree.update(kept)
        else:
            answered.append(tree["id"])

    case = "previous_response_id"
    assert with_fault(server, case, body=whole(keeping), start=pretending).verdict == verdict


@pytest.mark.slow
def test_a_format_that_is_ignored_is_caught() -> None:
    """The weak model does not end an object of its own: its words are put in its place."""

    def said(text: str) -> Change:
        message = {"id": "msg_1", "type": "message", "status": "completed"}
        message |= {"content": [{"type": "output_text", "text": text, "annotations": []}]}
        return answering(status="completed", incomplete_details=None, output=[message])

    schema, free_form = sorted(HELD, reverse=True)
    brief = asking(max_output_tokens=2)  # nobody reads the words
    with thinker() as free:
        assert with_fault(free, schema).verdict == "pass"
        assert with_fault(free, schema, asked=asking(text=None)).verdict == "FAIL"
        assert with_fault(free, free_form, asked=brief, body=said('{"city": "Paris"}')).verdict == "pass"
        assert with_fault(free, free_form, asked=brief, body=said("Paris")).verdict == "FAIL"
