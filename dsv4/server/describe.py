"""What /openapi.json says of an endpoint: the fields that a body may have, and every status that can come back."""

from __future__ import annotations

from typing import Any

from dsv4.server.refusal import anthropic
from dsv4.server.schema import IGNORED, NEUTRAL, Sent

Json = dict[str, Any]

_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}}
            | dict.fromkeys(("param", "code"), _TEXT_OR_NULL),
        }
    },
}
_ANTHROPIC_ERROR: Json = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_REFUSALS = {
    400: "what is asked for cannot be had; the message names the field and what would be taken",
    401: "the key is wrong or missing",
    404: "there is no such model",
    413: "the body is too large",
    415: "the body is no JSON",
    429: "the queue is full; Retry-After says when to come again",
    500: "the model's numbers are not finite, or the server made a mistake",
    503: "the server is shutting down, or its engine has stopped",
    504: "the deadline has passed",
}
_WORDS = (400, 401, 404, 413, 415, 500)
# path: the keys of a whole answer, None for plain text, and the refusals.
_PATHS: dict[str, tuple[tuple[str, ...] | None, tuple[int, ...]]] = {
    "/health": (("status",), ()),
    "/ready": (("status",), (503,)),
    "/version": (("version", "system_fingerprint"), ()),
    "/metrics": (None, (401,)),
    "/v1/models": (("object", "data"), (401,)),
    "/v1/models/{name:path}": (
        ("id", "object", "created", "owned_by", "max_model_len", "reasoning_efforts"),
        (401, 404),
    ),
    "/tokenize": (("tokens", "count", "max_model_len"), _WORDS),
    "/detokenize": (("prompt",), _WORDS),
    "/v1/messages/count_tokens": (("input_tokens",), _WORDS),
}
_CHOICES = ("id", "object", "created", "model", "system_fingerprint", "choices", "usage", "seed")
# The same of those that generate, whole or as a stream.
_GENERATES = {
    "/v1/chat/completions": _CHOICES,
    "/v1/completions": _CHOICES,
    "/v1/messages": ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage", "seed"),
    "/v1/responses": ("id", "object", "created_at", "status", "model", "output", "usage", "seed"),
}


def responses(path: str) -> dict[int | str, Json]:
    """By status."""
    keys, refusals = _PATHS[path] if path in _PATHS else (_GENERATES[path], tuple(_REFUSALS))
    error = _ANTHROPIC_ERROR if anthropic(path) else _ERROR
    said: dict[int | str, Json] = {
        status: {"description": _REFUSALS[status], "content": {"application/json": {"schema": error}}}
        for status in refusals
    }
    whole = {"schema": {"type": "object", "required": list(keys or ())}}
    content = {"text/plain": {"schema": {"type": "string"}}} if keys is None else {"application/json": whole}
    if path in _GENERATES:
        content |= {"text/event-stream": {}}  # OpenAPI 3.1 has no way to describe events
    said[200] = {"description": "done", "content": content}
    if path == "/health":
        said[503] = {"description": "the engine has stopped or hangs: restart the server", "content": content}
    if "{" in path:
        said["4XX"] = said[404]  # else FastAPI tells of a 422 that never comes
    return said


def request_body(kind: type[Sent]) -> Json:
    """`kind` as the body of an operation, with the fields that are ignored and those that may only ask for nothing."""
    schema = kind.model_json_schema()
    others: Json = {name: {"description": "ignored"} for name in IGNORED}
    others |= {name: {"enum": [None, *values]} for name, values in NEUTRAL.items()}
    schema["properties"] = dict(sorted(others.items())) | schema["properties"]
    schema["additionalProperties"] = False
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
