"""Many clients at once: who gets what, who waits, who is refused; leaving, failing, ending."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from dsv4.config import EngineOptions
from dsv4.engine.request import Delta
from dsv4.engine.scheduler import Work
from dsv4.llm import LLM
from dsv4.server.app import Service
from dsv4.server.options import ServerOptions
from tests import PICO
from tests.serving import ENDLESS, FRANCE, OFF, STORY, Running, changed, gated, running, until

CHAT = "/v1/chat/completions"
SCOPE = {
    "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST", "path": CHAT,
    "headers": [(b"content-type", b"application/json")], "query_string": b"", "http_version": "1.1",
}  # fmt: skip
LONG = {"messages": STORY, "max_tokens": 200, "stream": True, "logit_bias": ENDLESS} | OFF


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=5, max_context=256, prefill_chunk=16))


def idle(server: Running) -> bool:
    return not server.service.llm.engine.busy and server.service.worker.live == 0


# --- the same answer in any company ----------------------------------------------------------------------------------


def mixed(number: int) -> dict[str, Any]:
    countries = ("France", "Kenya", "Japan", "Peru")
    question = f"What is the capital of {countries[number % 4]}?" + " Please." * (number % 5)
    return {
        "messages": [{"role": "user", "content": question}],
        "temperature": (0, 1.3)[number % 2],
        "seed": number,
        "max_tokens": 3 + number % 5,
        "top_p": (1, 0.95)[number % 3 == 0],
        "logit_bias": {"900": 2.5} if number % 4 == 1 else None,
        "thinking": {"type": ("enabled", "disabled")[number % 2]},
        "logprobs": True,
        "top_logprobs": 3,
    }


def test_answers_and_logprobs_do_not_depend_on_company(server: Running) -> None:
    """16 requests one by one, all at once, and all at once backwards: equal to the last bit of each logprob."""
    widths: list[int] = []
    runner = server.service.llm.engine._runner
    real = runner.run

    def watched(work: Any) -> Any:
        widths.append(len(work))
        return real(work)

    def ask(number: int) -> str:
        choice = server.post(CHAT, mixed(number)).json()["choices"][0]
        return json.dumps(choice, sort_keys=True)

    alone = [ask(number) for number in range(16)]
    assert len(set(alone)) == 16
    runner.run = watched  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, range(16))) == alone
            assert list(pool.map(ask, reversed(range(16)))) == alone[::-1]
    finally:
        del runner.run
    assert max(widths) > 2  # they did share steps


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


class Slow:
    """A client at the other end of ASGI that takes nothing more until it is let."""

    def __init__(self) -> None:
        self.go, self.begun = asyncio.Event(), asyncio.Event()
        self.body = b""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.begun.set()
            await self.go.wait()
            self.body += message.get("body", b"")

    def text(self) -> str:
        return self.body.decode()


async def asked(service: Service, sent: Any, send: Any, then: Any = None) -> None:
    body = json.dumps(sent).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await (then or asyncio.Event().wait)()

    await service.app(SCOPE, receive, send)


class Leaving(Slow):
    """And one that goes away while it takes nothing."""

    async def receive(self) -> Any:
        await self.go.wait()
        return {"type": "http.disconnect"}


def content(stream: str) -> str:
    lines = [line[6:] for line in stream.split("\n\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line).get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


SHORT = {"messages": FRANCE, "stream": True} | OFF


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


async def until_there(service: Service) -> list[Any]:
    while not service.worker._clients:
        await asyncio.sleep(0.01)
    return list(service.worker._clients.values())


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


# --- no room ---------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_a_time_to_come_again(llm: LLM) -> None:
    """Five run, one waits, the seventh is told; when one leaves there is room again."""
    with running(llm, queue=1) as small, gated(llm) as gate:
        streams = [small.http.build_request("POST", CHAT, json=LONG | {"seed": n}) for n in range(6)]
        answers = [small.http.send(stream, stream=True) for stream in streams]
        refused = small.post(CHAT, SHORT)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "6 requests, 1 of them waiting; wanted at most 6" in refused.json()["error"]["message"]
        assert (small.metric("requests_running"), small.metric("requests_waiting")) == (5, 1)
        with pytest.raises(openai.RateLimitError):
            small.client().chat.completions.create(model="pico", messages=FRANCE)
        answers[0].close()
        gate.set()
        until(lambda: small.service.worker.live <= 5)
        again = small.http.build_request("POST", CHAT, json=LONG)
        answers.append(small.http.send(again, stream=True))
        assert answers[-1].status_code == 200
        for answer in answers:
            answer.close()
        until(lambda: idle(small))
        assert small.ended("refused") == 2


# --- failing ---------------------------------------------------------------------------------------------------------


def poisoned(item: Work, logits: torch.Tensor) -> torch.Tensor:
    """No numbers from the fourth token on, for the request whose seed is 13."""
    place = item.end - len(item.request.prompt)
    bad = [item.request.sampling.seed == 13 and place + row > 2 for row in range(len(logits))]
    return logits.masked_fill(torch.tensor(bad, dtype=torch.bool).unsqueeze(1), float("nan"))


def test_numbers_that_are_none_end_one_request_alone(server: Running, llm: LLM) -> None:
    before = server.ended("error")
    with changed(llm, poisoned), ThreadPoolExecutor(4) as pool:
        sent = [SHORT | {"seed": seed, "stream": stream} for seed in (12, 13) for stream in (True, False)]
        fine, also_fine, streamed, whole = pool.map(lambda one: server.post(CHAT, one), sent)
    assert (
        content(fine.text) == also_fine.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."
    )
    assert whole.status_code == 500
    assert "not finite; the weights are damaged" in whole.json()["error"]["message"]
    last = json.loads(streamed.text.rstrip().rpartition("data: ")[2])
    assert last["error"]["code"] == "not_finite"
    assert content(streamed.text) == "The capital of"
    assert server.ended("error") == before + 2
    assert server.get("/health").status_code == 200
    assert content(server.post(CHAT, SHORT | {"seed": 13}).text) == "The capital of France is Paris."


def test_a_stream_that_breaks_raises_in_the_client(server: Running, llm: LLM) -> None:
    with changed(llm, poisoned), pytest.raises(openai.APIError, match="not finite"):
        list(
            server.client().chat.completions.create(model="pico", messages=FRANCE, seed=13, stream=True, extra_body=OFF)
        )


def test_an_engine_that_dies_tells_all_and_takes_nothing_more(llm: LLM) -> None:
    gate = threading.Event()

    def explode(item: Work, logits: torch.Tensor) -> torch.Tensor:
        if item.request.sampling.seed == 13:
            raise RuntimeError("canary-5521")
        if item.end > len(
            item.request.prompt
        ):  # the stream has its first token, and no second before the other is there
            gate.wait(120)
        return logits

    with running(llm) as dying, changed(llm, explode), ThreadPoolExecutor(2) as pool:
        stream = pool.submit(dying.post, CHAT, LONG)
        until(lambda: dying.service.worker.live == 1)
        until(lambda: dying.metric("generation_tokens_total"))
        whole = pool.submit(dying.post, CHAT, SHORT | {"seed": 13, "stream": False})
        until(lambda: dying.service.worker.live == 2)
        gate.set()
        assert whole.result().status_code == 503
        assert "engine_stopped" in stream.result().text.splitlines()[-2]
        assert dying.get("/health").status_code == dying.get("/ready").status_code == 503
        assert dying.get("/health").json() == {"status": "the engine has stopped", "reason": "RuntimeError"}
        refused = dying.post(CHAT, SHORT)
        assert refused.status_code == 503
        assert "restart the server" in refused.json()["error"]["message"]
        assert dying.service.worker.live == 0
    assert not llm.engine.busy


# --- ending ----------------------------------------------------------------------------------------------------------


def test_what_runs_is_finished_before_the_end(llm: LLM) -> None:
    """After the signal: the stream comes to its own end, who comes meanwhile is told 503, and nobody after that."""
    with running(llm) as ending, ThreadPoolExecutor(1) as pool, gated(llm) as gate:
        got: list[str] = []
        begun = threading.Event()

        def read() -> None:
            with httpx.stream("POST", ending.url + CHAT, json=LONG | {"max_tokens": 30}, timeout=60) as answer:
                for line in answer.iter_lines():
                    got.append(line)
                    begun.set()

        reading = pool.submit(read)
        assert begun.wait(60)
        ending.server.end()
        assert ending.service.worker.draining
        assert httpx.get(ending.url + "/health").status_code == 200
        for told in (httpx.get(ending.url + "/ready"), httpx.post(ending.url + CHAT, json=SHORT)):
            assert (told.status_code, told.json()["error"]["code"]) == (503, "draining")
            assert int(told.headers["retry-after"]) >= 1
        gate.set()
        reading.result()
        ending.thread.join(60)
        assert not ending.thread.is_alive()
        assert '"finish_reason":"length"' in got[-4]
        assert "data: [DONE]" in got
        with pytest.raises(httpx.ConnectError):
            httpx.get(ending.url + "/health")


def test_a_draining_server_says_so(llm: LLM) -> None:
    service = Service(llm, ServerOptions(names=("pico",)))

    async def scene() -> str:
        service.worker.start()
        service.worker.drain()
        client = Slow()
        client.go.set()
        await asked(service, SHORT, client.send)
        service.worker.stop()
        return client.text()

    assert json.loads(asyncio.run(asyncio.wait_for(scene(), 60)))["error"]["code"] == "draining"


def test_deltas_say_when_they_are_none() -> None:
    assert Delta(0, 5, "x").error is None
