"""`dsv4 conform`: our own server passes, and each planted fault of the protocol is caught by a case of that name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from dsv4.check.conform.cases import CASES
from dsv4.check.conform.run import Verdict, conform
from dsv4.check.wire import Client
from dsv4.cli.main import main
from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests.conforming import KEY, Change, Faulty, breaking, other_name, speaker, swap, with_fault
from tests.serving import Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with speaker() as server:
        yield server


def verdicts(server: Running, *groups: str) -> dict[str, Verdict]:
    return {one.case.name: one for one in conform(Client(server.url, KEY, 60), None, groups)}


def test_the_names_of_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {name for case in CASES for name in (case.like, case.after)} - {None} <= {case.name for case in CASES}


def test_our_server_passes(server: Running) -> None:
    """Structured answers apart: a model whose words are dictated cannot be held to others."""
    found = verdicts(server, *{case.group for case in CASES} - {"structured"})
    assert {name: one for name, one in found.items() if one.verdict in ("FAIL", "unclear")} == {}
    assert found["a call"].verdict == found["a call, streamed"].verdict == found["a wrong key"].verdict == "pass"


@pytest.mark.slow
def test_the_embedded_model_passes() -> None:
    llm = LLM.load(options=EngineOptions(max_sequences=4, max_context=2048))
    with running(llm, key=KEY) as server:
        found = verdicts(server)
    assert len(found) == len(CASES)
    assert {name: one for name, one in found.items() if one.verdict != "pass"} == {}


def last(body: bytes) -> bytes:
    """The first chunk again, after the end."""
    return body.replace(b"data: [DONE]", body.split(b"\n\n")[0] + b"\n\ndata: [DONE]")


def new_ids(body: bytes) -> bytes:
    first, *rest = body.split(b'"id":"chatcmpl-')
    return first + b"".join(b'"id":"chatcmpl-%d' % n + part for n, part in enumerate(rest))


# What a fault does to every answer's body, and the case that has to catch it.
FAULTS: dict[str, tuple[Change, str]] = {
    "no [DONE]": (swap("data: [DONE]\n\n", ""), "framing"),
    "two [DONE]": (swap("data: [DONE]\n\n", "data: [DONE]\n\ndata: [DONE]\n\n"), "framing"),
    "a chunk that is no JSON": (swap('"delta":{"role"', '"delta":{role'), "framing"),
    "lines that are none of a stream": (swap("data: {", "{"), "framing"),
    "an error in the stream": (swap("data: [DONE]", 'data: {"error":{},"choices":[]}\n\ndata: [DONE]'), "framing"),
    "a finish_reason of its own": (swap('"finish_reason":"length"', '"finish_reason":"max"'), "cut at max_tokens"),
    "stop where it was cut": (swap('"finish_reason":"length"', '"finish_reason":"stop"'), "cut at max_tokens"),
    "no end in a stream": (swap('"finish_reason":"length"', '"finish_reason":null'), "one end and nothing behind it"),
    "a chunk behind the end": (last, "one end and nothing behind it"),
    "a character cut": (lambda body: body.replace("é".encode(), b"\xc3"), "UTF-8 is never cut"),
    "a character replaced": (
        lambda body: body.replace("é".encode(), b"\xef\xbf\xbd" * 2) if body.startswith(b"data") else body,
        "a stream says the same"),
    "no usage": (other_name("usage"), "usage"),
    "no usage in a stream": (other_name("usage"), "usage in the last chunk"),
    "a total that is no sum": (swap('"total_tokens":', '"total_tokens":1'), "usage"),
    "no role": (other_name("role"), "the role"),
    "no role in a stream": (other_name("role"), "the role comes first"),
    "a new id for each chunk": (new_ids, "one id in all chunks"),
    "arguments that are no JSON": (swap('Paris\\"}', "Paris"), "a call"),
    "streamed arguments that are no JSON": (swap('"arguments":"}"', '"arguments":""'), "a call, streamed"),
    "a call without an id": (other_name("id"), "a call"),
    "one id for all calls": (swap('_1","type":"function"', '_0","type":"function"'), "a call"),
    "no name in the first delta": (swap('"name":"warmth","arguments":""', '"arguments":""'), "a call, streamed"),
    "a probability above 1": (swap('"logprob":', '"logprob":1'), "logprobs"),
    "errors in another shape": (other_name("error"), "no messages"),
    "an error without a type": (other_name("type"), "an unknown model"),
    "an error that is a text": (lambda body: b'{"error":"no"}' if body[:8] == b'{"error"' else body, "no messages"),
    "an empty list of models": (swap('"object":"model"', '"object":"thing"'), "models are listed"),
    "a second answer that is the first": (swap('"index":1', '"index":0'), "two answers, streamed"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(server: Running, fault: str) -> None:
    change, case = FAULTS[fault]
    found = with_fault(server, case, body=change)
    assert found.verdict == "FAIL"
    assert found.got
    assert found.wanted


def as_200(start: dict[str, Any]) -> None:
    start["status"] = 200


def as_text(start: dict[str, Any]) -> None:
    start["headers"] = [(b"content-type", b"text/plain")]


@pytest.mark.parametrize(
    ("start", "case"),
    [
        (as_200, "a body that is no JSON"),
        (as_200, "a wrong key"),
        (as_200, "a call without an answer"),
        (as_200, "an answer to a call that was not made"),
        (as_text, "framing"),
        (breaking(1), "a client that leaves"),
    ],
)
def test_a_planted_status_or_header_is_caught(server: Running, start: Any, case: str) -> None:
    assert with_fault(server, case, start=start).verdict == "FAIL"


def as_404(start: dict[str, Any]) -> None:
    start["status"] = 404


@pytest.mark.slow
def test_a_failure_is_exit_code_1_and_json_says_which(
    server: Running, capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = server.server.config
    monkeypatch.setattr(config, "loaded_app", Faulty(config.loaded_app, start=as_404))
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    command = ["conform", server.url, "--key-file", str(key), "--group", "responses"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    assert "absent" in capsys.readouterr().out
    for more, code, verdict in (([], 0, "absent"), (["--all"], 1, "FAIL")):
        with pytest.raises(SystemExit) as stop:
            main([*command, *more, "--json"])
        assert stop.value.code == code
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        # Some refuse with 404 themselves. Where the endpoint is not there, they are not asked.
        assert {line["verdict"] for line in lines} - ({"pass"} if more else set()) == {verdict}
