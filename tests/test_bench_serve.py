"""`dsv4 bench serve`: what is asked when, what is counted, and what a record says. Speed itself is not judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4.bench.load import Length, Point, Record, Traffic, arrivals, measure, read_prompts
from dsv4.bench.load_figures import figures, percentile, read_slo
from dsv4.check.wire import Client
from dsv4.cli.main import main
from dsv4.config import EngineOptions
from dsv4.engine.request import Sampling
from dsv4.errors import RequestError
from dsv4.llm import LLM
from tests import PICO
from tests.serving import Running, dictated, running

WORDS = "hm</think>" + "one two three four " * 4


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    llm = LLM.load(PICO, EngineOptions(max_sequences=4, max_context=512, draft_tokens=0, reuse_points=0))
    with dictated(llm, WORDS), running(llm) as server:
        yield server


def code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "serve", *arguments])
    return int(stop.value.code or 0)


def user(body: bytes) -> str:
    return str(json.loads(body)["messages"][0]["content"])


def test_prompts_repeat_with_the_seed_and_begin_differently() -> None:
    traffic = Traffic(model="m", prompt=Length(20, 40))
    bodies = [traffic.body(n) for n in range(50)]
    assert bodies == [Traffic(model="m", prompt=Length(20, 40)).body(n) for n in range(50)]
    assert len({user(body).split()[0] for body in bodies}) == 50
    assert bodies[0] != Traffic(model="m", seed=1, prompt=Length(20, 40)).body(0)


@pytest.mark.slow
def test_the_embedded_model_has_an_answer_to_them() -> None:
    llm = LLM.load(None, EngineOptions(max_context=512, max_sequences=1))
    for number in range(3):
        asked = json.loads(Traffic(model="m").body(number))
        prompt = llm.tokenizer.encode_prompt(llm.prompt(asked["messages"]).pieces)
        assert 120 <= len(prompt) <= 140
        told = list(llm.generate(prompt, Sampling(max_tokens=32, seed=number)))
        assert len(told) >= 16  # some stories are short


def test_a_shared_prefix_is_shared() -> None:
    texts = [user(Traffic(model="m", shared=12).body(n)).split() for n in range(9)]
    assert len({tuple(text[:12]) for text in texts}) == 1
    assert len({text[12] for text in texts}) == 9


def test_arrivals_are_those_of_the_rate_and_the_seed() -> None:
    moments = list(arrivals(4.0, 4000, 7))
    assert moments == sorted(moments) == list(arrivals(4.0, 4000, 7))
    assert moments[-1] == pytest.approx(1000, rel=0.1)


def test_percentiles() -> None:
    assert [percentile(range(1, 101), p) for p in (50, 90, 95, 99)] == [50, 90, 95, 99]
    assert percentile([3.0], 50) == 3.0
    assert percentile([], 50) is None


def test_latency_counts_from_the_intended_start() -> None:
    """A request that had to wait for its turn 5 s was 6 s under way: no coordinated omission."""
    record = Record(intended=10, begun=15, arrivals=[16, 16.5, 18], end=19, prompt_tokens=9, cached=4, tokens=5)
    late = Record(intended=11, begun=11, end=12, error="HTTP 429")
    found = figures(Point(users=1, records=[record, late], begun=10), {"ttft": 6000, "tpot": 499})
    assert found.line() | {"seconds": 0} == {
        "rate": None, "users": 1, "good": 1, "errors": {"HTTP 429": 1}, "cached_tokens": 4, "seconds": 0,
        "requests_per_second": 0.111,
        "prompt_tokens_per_second": 1.0, "tokens_per_second": 0.556, "goodput_per_second": 0.0, "met": 0,
        "ttft_ms": dict.fromkeys(("p50", "p90", "p95", "p99"), 6000), "client_late_p99_ms": 5000,
        "tpot_ms": dict.fromkeys(("p50", "p90", "p95", "p99"), 500),
        "itl_ms": {"p50": 500, "p90": 1500, "p95": 1500, "p99": 1500},
        "e2e_ms": dict.fromkeys(("p50", "p90", "p95", "p99"), 9000)}  # fmt: skip
    assert figures(Point(records=[record]), {"ttft": 6000, "tpot": 500}).met == 1
    assert figures(Point(records=[record]), {"ttft": 5999}).met == 0


@pytest.mark.parametrize("point", [Point(rate=200.0), Point(users=3)], ids=["open", "closed"])
def test_every_request_is_counted_once_and_warm_up_is_not(server: Running, point: Point) -> None:
    point = Point(point.rate, point.users)
    before = server.ended("stop") + server.ended("length")
    measure(Client(server.url), lambda name: Traffic(model=name, answer=Length(8, 8)), [point], None,
            count=7, warm_up=2, seen=lambda: None)  # fmt: skip
    assert server.ended("stop") + server.ended("length") == before + 9
    assert [record.error for record in point.records] == [None] * 7
    assert [record.tokens for record in point.records] == [8] * 7
    assert all(record.intended <= record.begun <= record.arrivals[0] <= record.end for record in point.records)
    if point.rate is not None:
        planned = [point.begun + at for at in arrivals(point.rate, 7, 0)]
        assert sorted(record.intended for record in point.records) == planned


def test_errors_are_counted_by_their_kind(server: Running) -> None:
    point = Point(users=2)
    wrong = Traffic(model="pico", extra={"temperature": -1})
    measure(Client(server.url), lambda _: wrong, [point], "pico", count=4, warm_up=0, seen=lambda: None)
    assert figures(point, {}).errors == {"HTTP 400": 4}
    with pytest.raises(RequestError, match="warm-up"):
        measure(Client(server.url), lambda _: wrong, [point], "pico", count=4, warm_up=1, seen=lambda: None)


@pytest.mark.slow
def test_no_load_repeats_what_another_asked() -> None:
    """A server with a prefix cache would have the answer half done; what it remembers all the same is told."""
    points = [Point(users=1), Point(users=2), Point(rate=200.0)]
    asked = Traffic(model="pico", prompt=Length(300, 300), answer=Length(2, 2), seed=5)
    how: dict[str, Any] = {"count": 3, "warm_up": 1, "seen": lambda: None}
    with running(LLM.load(PICO, EngineOptions(max_sequences=4, max_context=2048))) as server:
        measure(Client(server.url), lambda _: asked, points, "pico", **how)
        assert [figures(point, {}).cached for point in points] == [0, 0, 0]
        again = Point(users=1)
        measure(Client(server.url), lambda _: asked, [again], "pico", **how)
    assert figures(again, {}).cached >= 3 * 256


def test_a_sweep_is_a_table_lines_and_a_picture(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "o.jsonl", tmp_path / "o.png"
    more = ["--requests", "4", "--answer", "4-8", "--slo", "ttft:60000", "--out", str(out), "--plot", str(plot)]
    assert code(server.url, "--concurrency", "1,2", *more) == 0
    text = capsys.readouterr().out
    assert "2 users" in text
    assert "in time" in text
    assert max(map(len, text.splitlines())) <= 80
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["users"], line["good"], line["met"]) for line in lines] == [(1, 4, 4), (2, 4, 4)]
    assert all(line["ttft_ms"]["p50"] <= line["e2e_ms"]["p50"] for line in lines)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --rate or --concurrency"),
        (["--rate", "1", "--concurrency", "1"], "either --rate or --concurrency"),
        (["--rate", "0"], "numbers above 0"),
        (["--concurrency", "1.5"], "numbers above 0"),
        (["--rate", "1", "--slo", "ttft"], "ttft:MS"),
        (["--rate", "1", "--prompt", "9-3"], "a number of tokens"),
        (["--rate", "1", "--extra", "[]"], "a JSON object"),
        (["--rate", "1", "--plot", "x.pdf"], ".png or .svg"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("http://127.0.0.1:1", *arguments) == 1
    assert said in capsys.readouterr().err


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("http://127.0.0.1:1", "--concurrency", "1") == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 3}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    traffic = Traffic(model="m", prompts=read_prompts(path), answer=Length(9, 9))
    assert [(user(traffic.body(n)), json.loads(traffic.body(n))["max_tokens"]) for n in range(3)] == [
        ("a", 3), ("b", 9), ("a", 3)]  # fmt: skip
    path.write_text('{"text": "a"}\n')
    with pytest.raises(RequestError, match="line 1"):
        read_prompts(path)


def test_promises() -> None:
    assert read_slo("ttft:1000,tpot:50") == {"ttft": 1000, "tpot": 50}
    assert read_slo("") == {}
