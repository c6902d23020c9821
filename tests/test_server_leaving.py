"""Clients that leave, and clients that read slowly or not at all: their requests end or wait, and nobody else's do."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from dsv4.server.app import Service
from dsv4.server.options import ServerOptions
from tests import PICO
from tests.asgi import CHAT, LONG, SCOPE, SHORT, Leaving, Slow, asked, content, idle, until_there
from tests.serving import ENDLESS, OFF, STORY, Running, gated, until


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=5, max_context=256, prefill_chunk=16))


# --- leaving ---------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_a_stream_ends_its_request(server: Running, llm: LLM) -> None:
    before = server.ended("cancelled")
    with gated(llm), server.http.stream("POST", CHAT, json=LONG) as answer:
        lines = answer.iter_lines()
        assert "assistant" in next(lines)
        until(lambda: llm.engine.busy)
        answer.close()
        until(lambda: server.ended("cancelled") == before + 1)
    until(lambda: idle(server))
    assert server.ended("cancelled") == before + 1


def test_a_client_that_leaves_before_its_answer_is_whole_ends_its_request(server: Running, llm: LLM) -> None:
    before = server.ended("cancelled")
    with gated(llm):
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(CHAT, json=LONG | {"stream": False}, timeout=httpx.Timeout(60, read=0.2))
        until(lambda: server.ended("cancelled") == before + 1)
    until(lambda: idle(server))
    assert server.ended("cancelled") == before + 1


def test_a_closed_stream_of_the_openai_client_ends_all_its_answers(server: Running, llm: LLM) -> None:
    before = server.ended("cancelled")
    client = server.client()
    with gated(llm):
        stream = client.chat.completions.create(
            model="pico", messages=STORY, n=3, stream=True, max_tokens=200, logit_bias=ENDLESS, extra_body=OFF
        )
        next(iter(stream))
        stream.close()
        until(lambda: server.ended("cancelled") == before + 3)
    until(lambda: idle(server))


def test_a_client_that_leaves_with_half_a_request_sent_is_no_error(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    service = Service(llm, ServerOptions(names=("pico",)))

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None: ...

    asyncio.run(service.app(SCOPE, receive, send))
    assert caplog.text == ""


# --- reading slowly --------------------------------------------------------------------------------------------------


def test_a_slow_reader_waits_and_nobody_else(llm: LLM) -> None:
    """It is put on hold after `unread` tokens, others answer meanwhile, and in the end it has all of its answer."""
    service = Service(llm, ServerOptions(names=("pico",), unread=4))

    async def scene() -> tuple[str, str, int]:
        service.worker.start()
        slow, quick = Slow(), Slow()
        quick.go.set()
        waiting = asyncio.ensure_future(asked(service, SHORT, slow.send))
        await slow.begun.wait()
        (reading,) = {theirs for theirs, _ in await until_there(service)}
        while reading.held_since is None:
            await asyncio.sleep(0.01)
        for _ in range(3):
            await asked(service, SHORT, quick.send)
        unread = reading.sent
        assert not waiting.done()
        slow.go.set()
        await waiting
        service.worker.stop()
        return slow.text(), quick.text(), unread

    slow, quick, unread = asyncio.run(asyncio.wait_for(scene(), 60))
    assert content(slow) == "The capital of France is Paris."
    assert content(quick) == 3 * content(slow)
    assert slow.rstrip().endswith("[DONE]")
    assert 4 < unread <= 4 + 3  # a step gives at most one token and two guesses


def test_a_client_may_leave_while_it_is_on_hold(llm: LLM) -> None:
    service = Service(llm, ServerOptions(names=("pico",), unread=2))

    async def scene() -> None:
        service.worker.start()
        client, leaving = Slow(), Leaving()
        waiting = asyncio.ensure_future(asked(service, SHORT, client.send, leaving.receive))
        (reading,) = {theirs for theirs, _ in await until_there(service)}
        while reading.held_since is None:
            await asyncio.sleep(0.01)
        leaving.go.set()
        await waiting
        while service.worker.live:
            await asyncio.sleep(0.01)
        service.worker.stop()

    asyncio.run(asyncio.wait_for(scene(), 60))
    assert service.metrics.ended == {"cancelled": 1}


def test_an_answer_that_nobody_reads_ends_and_frees_its_place(llm: LLM) -> None:
    service = Service(llm, ServerOptions(names=("pico",), unread=2, stall=0.2))

    async def scene() -> str:
        service.worker.start()
        slow = Slow()
        waiting = asyncio.ensure_future(asked(service, SHORT, slow.send))
        await slow.begun.wait()
        await until_there(service)
        while service.worker.live:
            await asyncio.sleep(0.01)
        slow.go.set()
        await waiting
        service.worker.stop()
        return slow.text()

    text = asyncio.run(asyncio.wait_for(scene(), 60))
    assert "The capital of France is Paris.".startswith(content(text))
    last = json.loads(text.rstrip().rpartition("data: ")[2])
    assert last["error"]["code"] == "reader_stalled"
    assert service.metrics.ended == {"stalled": 1}
