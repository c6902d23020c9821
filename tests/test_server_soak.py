"""Hundreds of clients of every kind at once: nothing is lost, nothing is left, and nobody sees another's words."""

from __future__ import annotations

import contextlib
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests.serving import ENDLESS, OFF, Running, running, until

CHAT = "/v1/chat/completions"
KINDS = ("whole", "stream", "leave", "malformed", "oversized", "many")


def sent(number: int) -> dict[str, Any]:
    """A request of its own for each of twelve numbers; its user says a word that no other does."""
    draw = random.Random(number)
    words = " ".join(draw.choices(("capital", "France", "story", "fish", "king"), k=draw.randint(1, 30)))
    return {
        "messages": [{"role": "user", "content": f"canary{number} {words}"}],
        "temperature": draw.choice((0, 1, 1.7)),
        "seed": number,
        "max_tokens": draw.randint(1, 12),
        "logprobs": True,
        "top_logprobs": 2,
    } | OFF


def answered(server: Running, number: int, stream: bool) -> list[Any]:
    """Tokens, logprobs and why it ended. A full queue is waited for, as it says."""
    while (answer := server.post(CHAT, sent(number) | {"stream": stream})).status_code == 429:
        assert int(answer.headers["retry-after"]) >= 1
        time.sleep(0.1)
    assert answer.status_code == 200, answer.text
    if not stream:
        (choice,) = answer.json()["choices"]
        return [choice["logprobs"]["content"], choice["finish_reason"]]
    lines = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in line["choices"]]
    entries = [entry for choice in choices for entry in choice.get("logprobs", {}).get("content", ())]
    return [entries, choices[-1]["finish_reason"]]


def leave(server: Running, endless: Any, chunks: int) -> None:
    """Read a little, or wait a little for all of it, and go."""
    with (
        contextlib.suppress(httpx.ReadTimeout),
        server.http.stream("POST", CHAT, json=endless, timeout=0.3) as answer,
    ):
        lines = answer.iter_lines()
        for _ in range(chunks):
            next(lines, None)


def act(server: Running, kind: str, number: int) -> list[Any] | None:
    """One client. Those that have an answer give it back."""
    if kind in ("whole", "stream"):
        return answered(server, number, kind == "stream")
    if kind == "leave":
        endless = sent(number) | {"stream": number % 2 == 0, "max_tokens": 200, "logit_bias": ENDLESS}
        leave(server, endless, number)
    elif kind == "malformed":
        assert server.post(CHAT, json.dumps(sent(number)).encode()[: 10 + number]).status_code == 400
    elif kind == "oversized":
        long = [{"role": "user", "content": "fish " * 400}]
        assert server.post(CHAT, {"messages": long}).status_code == 400
    else:
        assert server.post(CHAT, sent(number) | {"n": 3, "max_tokens": 2}).status_code in (200, 429)
    return None


@pytest.mark.slow
def test_a_crowd_of_every_kind(seed: int) -> None:
    """300 requests by 24 clients: every answer is bit for bit that of the same request alone."""
    llm = LLM.load(options=EngineOptions(max_sequences=6, max_context=256, prefill_chunk=24))
    draw = random.Random(seed)
    plan = [(draw.choice(KINDS), draw.randrange(12)) for _ in range(300)]
    with running(llm, queue=12) as server:
        alone = [answered(server, number, False) for number in range(12)]
        with ThreadPoolExecutor(24) as pool:
            found = list(pool.map(lambda one: act(server, *one), plan))
        until(lambda: server.service.worker.live == 0 and not llm.engine.busy)
        for (kind, number), answer in zip(plan, found, strict=True):
            assert answer is None or answer == alone[number], (kind, number)
        ended = server.service.metrics.ended
        assert ended["error"] == ended["stalled"] == 0
        assert ended["cancelled"] > 0
        assert sorted(llm.engine._scheduler._free) == list(range(6))
        assert server.service.worker._clients == {}
        assert [answered(server, number, True) for number in range(12)] == alone
