"""Many clients at once: who gets what, who waits, who is refused; failing, ending."""

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
from tests.asgi import CHAT, LONG, SHORT, Slow, asked, content, idle
from tests.serving import FRANCE, OFF, Running, changed, gated, running, until


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=5, max_context=256, prefill_chunk=16))


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


@pytest.mark.slow
def test_answers_and_logprobs_do_not_depend_on_company(server: Running) -> None:
    """16 requests one by one, all at once, and all at once backwards: equal to the last bit of each logprob."""
    widths: list[int] = []
    runner = server.service.llm.engine._runner
    real = runner.run

    def watched(work: Any, unread: Any = None) -> Any:
        widths.append(len(work))
        return real(work, unread)

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
