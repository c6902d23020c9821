"""Requests that may take only so long: the server's deadline, and the one that a request brings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from dsv4.server.app import Service
from dsv4.server.options import ServerOptions
from tests import PICO
from tests.asgi import CHAT, Slow, asked, idle
from tests.serving import ENDLESS, FRANCE, OFF, STORY, Running, gated, running, slowly, until

LONG = {"messages": STORY, "max_tokens": 200, "logit_bias": ENDLESS} | OFF
WORDY = {"messages": [{"role": "user", "content": "fish " * 200}], "max_tokens": 1} | OFF  # long before its first token


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=512, prefill_chunk=4))


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm, deadline=60.0) as server:
        yield server


def error(text: str) -> dict[str, Any]:
    return dict(json.loads(text.rstrip().rpartition("data: ")[2])["error"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("asked", "least"), [(LONG, 1), (WORDY, 0)])
def test_a_request_past_its_deadline_ends(
    server: Running, llm: LLM, asked: dict[str, Any], least: int, stream: bool
) -> None:
    """With a status if nothing has been sent, else with an event; its slot is free."""
    before = server.ended("deadline")
    with slowly(llm):
        answer = server.post(CHAT, asked | {"stream": stream, "timeout": 0.3})
    found = error(answer.text)
    assert found["code"] == "deadline_exceeded"
    assert " in 0.3 s; ask for fewer, or allow a longer timeout" in found["message"]
    begun = not found["message"].startswith("the deadline has passed; got 0 tokens")
    if not least:
        assert not begun
    assert answer.status_code == (200 if stream and begun else 504)
    assert answer.headers.get("x-should-retry") == ("false" if answer.status_code == 504 else None)
    until(lambda: idle(server))
    assert server.ended("deadline") == before + 1


@pytest.mark.parametrize("mine", [None, 60])
def test_the_servers_own_deadline_counts_where_it_is_less(llm: LLM, mine: float | None) -> None:
    with running(llm, deadline=0.3) as hurried, slowly(llm):
        found = error(hurried.post(CHAT, LONG | {"timeout": mine}).text)
        assert " in 0.3 s" in found["message"]
        assert found["type"] == "server_error"
        until(lambda: idle(hurried))


def test_a_deadline_counts_in_the_queue_too(server: Running, llm: LLM) -> None:
    """Both slots are taken: it never has one, and those who have go on."""
    with slowly(llm):
        streams = [
            server.http.build_request("POST", CHAT, json=LONG | {"stream": True, "max_tokens": 450}) for _ in range(2)
        ]
        answers = [server.http.send(stream, stream=True) for stream in streams]
        found = error(server.post(CHAT, {"messages": FRANCE, "timeout": 0.2}).text)
        assert found["message"].startswith("the deadline has passed; got 0 tokens in 0.2 s")
        assert server.service.worker.live == 2
        for answer in answers:
            answer.close()
    until(lambda: idle(server))


def test_a_request_in_time_is_not_touched(server: Running) -> None:
    sent = {"messages": FRANCE, "seed": 5} | OFF
    plain = server.post(CHAT, sent).json()["choices"]
    assert server.post(CHAT, sent | {"timeout": 60}).json()["choices"] == plain
    assert plain[0]["message"]["content"] == "The capital of France is Paris."


@pytest.mark.parametrize("wrong", [0, -1, "1", True, [1]])
def test_a_timeout_that_is_none(server: Running, wrong: Any) -> None:
    answer = server.post(CHAT, {"messages": FRANCE, "timeout": wrong})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "timeout"


def test_a_client_may_leave_before_its_deadline(server: Running, llm: LLM) -> None:
    """Also one whose stream has not begun, as its status line waits for the first token."""
    before = server.ended("cancelled")
    with gated(llm), pytest.raises(httpx.ReadTimeout):
        server.http.post(CHAT, json=WORDY | {"stream": True, "timeout": 50}, timeout=httpx.Timeout(60, read=0.2))
    until(lambda: idle(server))
    assert server.ended("cancelled") == before + 1


def test_an_answer_on_hold_ends_at_its_deadline(llm: LLM) -> None:
    """Nobody reads and so no step is run: the engine's thread has to wake for it."""
    service = Service(llm, ServerOptions(names=("pico",), unread=2, stall=3600))

    async def scene() -> str:
        service.worker.start()
        slow = Slow()
        sent = {"messages": FRANCE, "stream": True, "timeout": 1.5} | OFF
        waiting = asyncio.ensure_future(asked(service, sent, slow.send))
        await slow.begun.wait()
        while service.worker.live:
            await asyncio.sleep(0.01)
        slow.go.set()
        await waiting
        service.worker.stop()
        return slow.text()

    text = asyncio.run(asyncio.wait_for(scene(), 60))
    assert error(text)["code"] == "deadline_exceeded"
    assert service.metrics.ended == {"deadline": 1}
