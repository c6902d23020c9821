"""Anthropic's own client, and what tests of /v1/messages say with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx

from tests.serving import FRANCE, Running, named_events
from tests.test_server_tools import BOTH

if TYPE_CHECKING:
    import anthropic

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
ASK: dict[str, Any] = {"messages": FRANCE, "max_tokens": 40}
THINK = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"name": "warmth", "description": "How warm it is", "input_schema": SCHEMA}]
SAID = "I must look.</think>" + BOTH
GREEDY = {"temperature": 0}


def client_of(server: Running, key: str = "none") -> anthropic.Anthropic:
    import anthropic  # by the one worker that needs it: seconds

    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=60)


def ask(client: anthropic.Anthropic, extra: Any = GREEDY, **asked: Any) -> Any:
    """A whole message."""
    return client.messages.create(model="pico", extra_body=extra, **(ASK | asked))


def streamed(client: anthropic.Anthropic, extra: Any = GREEDY, **asked: Any) -> Any:
    """What the client makes of a stream."""
    with client.messages.stream(model="pico", extra_body=extra, **(ASK | asked)) as stream:
        return stream.get_final_message()


def same(one: Any, other: Any) -> bool:
    """Whether two messages differ in nothing but the name of the answer, which the ids of calls hold as well."""
    return bool(plain(one) == plain(other))


def plain(message: Any) -> Any:
    said = message.model_dump(exclude={"id", "seed"})
    said["usage"] = (total(message.usage), message.usage.output_tokens, message.usage.output_tokens_details)
    said["content"] = [{k: v for k, v in part.items() if k not in ("id", "parsed_output")} for part in said["content"]]
    return {name: value for name, value in said.items() if name not in ("logit_hash", "unparsed")}


def events(server: Running, sent: Any) -> list[tuple[str, dict[str, Any]]]:
    return named_events(server, MESSAGES, sent)


def refusal(answer: httpx.Response, status: int, kind: str) -> str:
    assert answer.status_code == status, answer.text
    said = answer.json()
    assert set(said) == {"type", "error"}
    assert (said["type"], set(said["error"])) == ("error", {"type", "message"})
    assert said["error"]["type"] == kind
    return str(said["error"]["message"])


def total(usage: Any) -> int:
    return int(usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens)
