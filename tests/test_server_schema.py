"""The server against its own description: whatever that lets a client send, and whatever it does not.

schemathesis makes requests of /openapi.json, right ones and wrong ones. None may be answered with a 500, or with a
status, a type or a form that the description does not promise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from dsv4.server.schema import IGNORED, NEUTRAL
from tests import PICO
from tests.serving import Running, running

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
GENERATES = re.compile("completions$|messages$|responses$")
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
GOOD: dict[str, dict[str, Any]] = {
    "GET /health": {},
    "GET /ready": {},
    "GET /version": {},
    "GET /metrics": {},
    "GET /v1/models": {},
    "GET /v1/models/{name}": {"path_parameters": {"name": "pico"}},
    "POST /v1/chat/completions": {"body": CHAT},
    "POST /v1/completions": {"body": {"prompt": "x", "max_tokens": 2}},
    "POST /v1/responses": {"body": {"input": "x", "max_output_tokens": 2}},
    "POST /v1/messages": {"body": CHAT},
    "POST /v1/messages/count_tokens": {"body": {"messages": CHAT["messages"]}},
    "POST /tokenize": {"body": {"prompt": "x"}},
    "POST /detokenize": {"body": {"tokens": [300]}},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    llm = LLM.load(PICO, EngineOptions(max_sequences=4, max_context=32))
    with running(llm, deadline=2.0) as server:
        yield server


@pytest.fixture(scope="module")
def schema(server: Running) -> Any:
    return schemathesis.openapi.from_dict(server.get("/openapi.json").json())


def operation(schema: Any, name: str) -> APIOperation:
    method, _, path = name.partition(" ")
    return schema[path][method]


def ask(server: Running, schema: Any, name: str, examples: int, *, derandomize: bool) -> None:
    """So many requests, that fit the description and that do not."""
    asked = operation(schema, name)
    wrong = GenerationMode.NEGATIVE if "{" in name or "POST" in name else GenerationMode.POSITIVE
    cases = asked.as_strategy(GenerationMode.POSITIVE) | asked.as_strategy(wrong)

    @settings(max_examples=examples, derandomize=derandomize, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases, data=st.data())
    def one(case: Any, data: Any) -> None:
        if isinstance(case.body, dict) and GENERATES.search(name):
            usual: dict[str, Any] = CHAT | {"prompt": "x", "input": "x", "max_output_tokens": 2}
            for field in data.draw(st.sets(st.sampled_from(sorted(usual)))):  # else hardly any would get to the model
                if field in asked.body[0].raw_schema["properties"]:
                    case.body[field] = usual[field]
        answer = case.call(base_url=server.url)
        assert answer.status_code not in (500, 503), answer.text  # a 504 is what was promised to the impatient
        case.validate_response(answer, checks=CHECKS)

    one()


@pytest.mark.parametrize("name", GOOD)
def test_no_request_of_the_description_is_a_surprise(server: Running, schema: Any, name: str) -> None:
    ask(server, schema, name, 8 if "POST" in name else 5, derandomize=True)
    assert server.service.worker.crash is None


@pytest.mark.parametrize("name", GOOD)
def test_what_is_answered_is_what_the_description_promises(server: Running, schema: Any, name: str) -> None:
    sorts: list[dict[str, Any]] = [{}, {"stream": True}] if GENERATES.search(name) else [{}]
    for sort in sorts:
        given = GOOD[name] | ({"body": GOOD[name]["body"] | sort} if sort else {})
        case = operation(schema, name).Case(**given, media_type="application/json" if "body" in given else None)
        answer = case.call(base_url=server.url)
        assert answer.status_code == 200
        case.validate_response(answer, checks=CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GOOD if "POST" in name])
def test_nor_is_one_of_many(server: Running, schema: Any, name: str) -> None:
    ask(server, schema, name, 200, derandomize=False)
    assert server.service.worker.crash is None


def test_the_description_lists_all_that_is_taken(schema: Any) -> None:
    """Every endpoint, and for a body its own fields, the ignored and the neutral ones and no others."""
    assert {f"{found.ok().method.upper()} {found.ok().path}" for found in schema.get_all_operations()} == set(GOOD)
    for name in GOOD:
        asked = operation(schema, name).definition.raw
        assert "422" not in asked["responses"]
        if "POST" in name:
            body = asked["requestBody"]["content"]["application/json"]["schema"]
            assert set(body["properties"]) > IGNORED | set(NEUTRAL)
            assert body["additionalProperties"] is False
