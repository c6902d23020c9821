"""Responses of /v1/responses, judged: the whole one against the stream, and the stream event by event."""

from __future__ import annotations

from typing import Any

import openai
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.serving import Running, named_events
from tests.test_server_tools import BOTH

PATH, CHAT = "/v1/responses", "/v1/chat/completions"
FRANCE = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
DRY: dict[str, Any] = {"reasoning": {"effort": "none"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [{"type": "function", "name": "warmth", "parameters": SCHEMA, "strict": False}]
SAID = "I must look.</think>" + BOTH
LOGPROBS: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
DONE = ("completed", "incomplete", "failed")


def ask(client: openai.OpenAI, extra: Any = None, **asked: Any) -> Any:
    """A response by the client itself."""
    given: dict[str, Any] = {"input": FRANCE, "temperature": 0} | asked
    return client.responses.create(model="pico", extra_body=extra, **given)


class Plan(BaseModel):
    days: list[bool]
    sure: bool


def plain(response: Any) -> Any:
    """A response without its names, its time, and what an earlier request had left for it."""
    if isinstance(response, list):
        return [plain(one) for one in response]
    if not isinstance(response, dict):
        return response
    names = ("id", "item_id", "call_id", "created_at", "cached_tokens", "seed", "logit_hash")
    return {name: plain(value) for name, value in response.items() if name not in names}


def judged(events: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The response of a stream, whose events have the right order, form and sum."""
    for n, (kind, said) in enumerate(events):
        assert said["sequence_number"] == n
        assert EVENTS.validate_python(said).type == kind
    kinds = [kind for kind, _ in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    for _, said in events[:2]:
        assert (said["response"]["status"], said["response"]["output"]) == ("in_progress", [])
    response: dict[str, Any] = events[-1][1]["response"]
    assert kinds[-1] == f"response.{response['status']}"
    assert sum(kind.removeprefix("response.") in DONE for kind in kinds) == 1
    rest = events[2:-1]
    for index, item in enumerate(response["output"]):
        own = [said for _, said in rest if said["output_index"] == index]
        assert own == [said for _, said in rest[: len(own)]]  # item after item
        rest = rest[len(own) :]
        judge_item(item, own)
    assert not rest
    return response


def judge_item(item: dict[str, Any], own: list[dict[str, Any]]) -> None:
    """Opened, spelt out, closed; what was spelt is what it holds at the end."""
    assert {said.get("item_id", item["id"]) for said in own} == {item["id"]}
    part = item["content"][0] if "content" in item else None
    begun = {"status": "in_progress"} | ({"content": []} if part else {"arguments": ""})
    assert own[0] == own[0] | {"type": "response.output_item.added", "item": item | begun}
    assert own[-1] == own[-1] | {"type": "response.output_item.done", "item": item}
    stem = f"response.{part['type']}" if part else "response.function_call_arguments"
    deltas = [said for said in own if said["type"] == f"{stem}.delta"]
    done = next(said for said in own if said["type"] == f"{stem}.done")
    frame = [own[0], *([own[1]] if part else []), *deltas, done, *([own[-2]] if part else []), own[-1]]
    assert frame == own
    spelt = "".join(said["delta"] for said in deltas)
    assert all(said["delta"] for said in deltas)
    if part is None:
        assert spelt == done["arguments"] == item["arguments"]
        return
    assert spelt == done["text"] == part["text"]
    assert {said["content_index"] for said in own[1:-1]} == {0}
    empty = part | {"text": ""} | ({"logprobs": []} if "logprobs" in part else {})
    assert own[1] == own[1] | {"type": "response.content_part.added", "part": empty}
    assert own[-2] == own[-2] | {"type": "response.content_part.done", "part": part}
    if "logprobs" in part:
        assert [entry for said in deltas for entry in said["logprobs"]] == done["logprobs"] == part["logprobs"]
        assert all(set(said["delta"]) for said in deltas)


def both(server: Running, **asked: Any) -> dict[str, Any]:
    """A response, which is the same streamed and whole."""
    sent = {"input": FRANCE, "temperature": 0} | asked
    answer = server.post(PATH, sent)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    Response.model_validate(whole)
    assert plain(judged(named_events(server, PATH, sent))) == plain(whole)
    return whole


def kinds(response: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item["type"], item["status"]) for item in response["output"]]


def spelt(item: dict[str, Any]) -> str:
    entries = item["content"][0]["logprobs"]
    return bytes(byte for entry in entries for byte in entry["bytes"]).decode()
