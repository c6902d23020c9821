"""A step of the engine that does not end: /health says so while it lasts, and is well again after it."""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests import PICO
from tests.serving import FRANCE, OFF, Running, gated, running, until

CHAT = "/v1/chat/completions"
SHORT = {"messages": FRANCE, "max_tokens": 2} | OFF
REASON = re.compile(r"a step has been running for (\d+\.\d) s; limit 0\.05 s")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=256))


def health(server: Running) -> tuple[int, dict[str, Any]]:
    answer = server.get("/health")
    return answer.status_code, answer.json()


def test_health_is_503_while_a_step_hangs_and_200_when_it_has_ended(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with running(llm, step_limit=0.05) as server, ThreadPoolExecutor(1) as pool:
        assert health(server) == (200, {"status": "ok"})
        with gated(llm) as gate, caplog.at_level(logging.WARNING, "dsv4.server"):
            answer = pool.submit(server.post, CHAT, SHORT)
            until(lambda: health(server)[0] == 503, 10)
            said = health(server)[1]
            assert said["status"] == "the engine hangs"
            assert REASON.fullmatch(said["reason"])
            ready = server.get("/ready")
            assert (ready.status_code, ready.json()["error"]["code"]) == (503, "engine_hangs")
            assert server.metric("step_age_seconds") > 0.05
            gate.set()
            assert answer.result(60).status_code == 200
        until(lambda: "dsv4_step_age_seconds 0\n" in server.get("/metrics").text)
        assert health(server) == (200, {"status": "ok"})
        assert server.get("/ready").status_code == 200
    assert re.search(r"a step took \d+\.\d s; limit 0\.05 s", caplog.text)  # it is known afterwards too


@pytest.mark.parametrize("limit", [0.0, 60.0])
def test_a_step_within_the_limit_or_without_one_is_health(llm: LLM, limit: float) -> None:
    with running(llm, step_limit=limit) as server, ThreadPoolExecutor(1) as pool, gated(llm) as gate:
        answer = pool.submit(server.post, CHAT, SHORT)
        until(lambda: server.metric("step_age_seconds") > 0.1)
        assert health(server) == (200, {"status": "ok"})
        gate.set()
        assert answer.result(60).status_code == 200


def test_an_engine_that_waits_for_work_is_not_hanging(llm: LLM) -> None:
    with running(llm, step_limit=0.001) as server:
        assert server.post(CHAT, SHORT).status_code == 200
        until(lambda: not llm.engine.busy)
        until(lambda: "dsv4_step_age_seconds 0\n" in server.get("/metrics").text)
        assert health(server) == (200, {"status": "ok"})


def test_an_engine_that_broke_in_a_long_step_has_stopped(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is to be restarted, and no step is running."""

    def broken() -> None:
        raise RuntimeError("no words of a user")

    with running(llm, step_limit=0.001) as server:
        monkeypatch.setattr(llm.engine, "step", broken)
        assert server.post(CHAT, SHORT).status_code == 503
        assert health(server) == (503, {"status": "the engine has stopped", "reason": "RuntimeError"})
        assert "dsv4_step_age_seconds 0\n" in server.get("/metrics").text
