"""What is refused: each with the right status, in OpenAI's shape, by name, and with what would be taken."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dsv4.config import EngineOptions
from dsv4.errors import ConfigError
from dsv4.llm import LLM
from dsv4.server import run
from dsv4.server.job import check_calls
from dsv4.server.refusal import Refusal
from dsv4.server.schema import IGNORED, NEUTRAL
from tests import PICO
from tests.serving import FRANCE, OFF, Running, running, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": FRANCE, "max_tokens": 1}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=64))


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm, body=4000, queue=2) as server:
        yield server


TOOL = {"type": "function", "function": {"name": "f"}}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "x"}


def called(*names: str) -> dict[str, Any]:
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def error(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "\n" not in found["message"]
    return dict(found)


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"messages": None}, "messages", "valid array"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, None, "message 0: role; got 'king'; wanted system, user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "these models read text only"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None, "leaves the model no turn"),
        ({"messages": [RESULT]}, "messages", "messages.0.tool_call_id; got 'a'; wanted the id of a call that stands"),
        ({"messages": [called("b"), RESULT]}, "messages", "messages.1.tool_call_id; got 'a'"),
        ({"messages": [called("a"), *FRANCE]}, "messages", "messages.0.tool_calls; got no answer to 'a'; wanted a"),
        ({"messages": [called("a"), {"role": "tool", "content": "x"}]}, "messages", "tool_call_id; got None"),
        ({"tools": [TOOL, TOOL]}, None, "tools; got 2 of the name 'f'; wanted a name of its own for each"),
        ({"temperature": "0.5"}, "temperature", "valid number; got '0.5'"),
        ({"temperature": -1}, "temperature", "temperature; got -1"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 1.5}, "top_p", "top_p; got 1.5; wanted a number from 0 to 1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 5}, "n", "too many answers asked for at once; got 5; wanted at most 4"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"max_tokens": 60}, "max_tokens", "wanted max_tokens up to 51, 64 tokens in all"),
        ({"seed": 1 << 63}, "seed", "less than"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "wanted a number from -100 to 100"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "wanted token ids as keys"),
        ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias", "token ids, each once"),
        ({"logit_bias": {"99999": 1}}, None, "no such token; got 99999; wanted 0 to 4223"),
        ({"reasoning_effort": "low"}, None, "no such effort; got low; wanted high"),
        ({"thinking": {"type": "on"}}, "thinking", 'wanted {"type": "enabled"}'),
        ({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}}, "thinking", "on and off"),
        ({"chat_template_kwargs": {"tone": True}}, "chat_template_kwargs", "got 'tone'"),
        ({"continue_final_message": True}, None, "nothing to continue; got a last message of role user"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "wanted the contrary"),
        ({"tools": [{"type": "function"}]}, None, "tools[0]"),
        ({"messages": [{"role": "system", "tools": [5]}, *FRANCE]}, None, "message 0: tools[0]"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "would change the answer; wanted 0, or no such field"),
        ({"ignore_eos": 1}, "ignore_eos", "would change"),
        ({"tpyo": 1}, "tpyo", "'tpyo' is not supported"),
        ({"stream_options": {"usage": True}}, "stream_options", "wanted include_usage"),
    ],
)
def test_a_chat_that_cannot_be_had(server: Running, changes: Any, param: str | None, said: str) -> None:
    found = error(server.post(CHAT, ASK | changes))
    assert said in found["message"]
    assert (found["type"], found["param"]) == ("invalid_request_error", param)


def answers(*names: str) -> list[dict[str, Any]]:
    return [RESULT | {"tool_call_id": name} for name in names]


@pytest.mark.parametrize("more", [[], FRANCE, [called("c"), *answers("c")]])
def test_calls_are_answered_in_any_order(more: Any) -> None:
    """And twice, if a client says so."""
    check_calls([*FRANCE, called("a", "b"), *answers("b", "a", "b"), *more])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([called("a"), *answers("a"), called(), *answers("a")], "messages.3.tool_call_id; got 'a'; wanted the id of"),
        ([called("a"), *answers("a"), *FRANCE, *answers("a")], "messages.3.tool_call_id; got 'a'"),
        (
            [called("b", "a"), *FRANCE],
            "messages.0.tool_calls; got no answer to 'a', 'b'; wanted a message of role tool",
        ),
        ([*FRANCE, called("a", "b"), *answers("a")], "messages.1.tool_calls; got no answer to 'b'"),
        ([called("a", "b"), *answers("a"), *FRANCE, *answers("b")], "messages.0.tool_calls; got no answer to 'b'"),
        ([{"role": "assistant", "tool_calls": [{}]}, *FRANCE], "messages.0.tool_calls.0.id; got None; wanted a text"),
    ],
)
def test_calls_without_answers_and_answers_without_calls(messages: Any, said: str) -> None:
    with pytest.raises(Refusal) as refused:
        check_calls(messages)
    assert str(refused.value).startswith(said)
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, ""),
        ({"prompt": [-1]}, "does not exist"),
        ({"prompt": [99999]}, "does not exist"),
        ({"prompt": "x", "best_of": 2}, "best_of; got 2; wanted the same as n"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo with logprobs"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "word " * 80}, "no room for an answer"),
        ({"prompt": ["x"] * 5}, "got 5; wanted at most 4"),
    ],
)
def test_a_text_that_cannot_be_had(server: Running, sent: Any, said: str) -> None:
    if sent == {"prompt": ""}:  # the beginning of a sentence alone is a prompt
        assert server.post(TEXT, sent | {"max_tokens": 1}).status_code == 200
        assert error(server.post(TEXT, sent | {"add_special_tokens": False}))["message"].startswith(
            "the prompt is empty"
        )
    else:
        assert said in error(server.post(TEXT, sent))["message"]


@pytest.mark.parametrize(
    "sent",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": ' + b"[" * 1900, b'{"messages": NaN}',
     b'{"temperature": Infinity, "messages": [{"role": "user", "content": "x"}]}',
     b'{"messages": [{"role": "user", "content": "\\ud800"}]}'],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_a_body_that_is_no_request(server: Running, path: str, sent: bytes) -> None:
    error(server.post(path, sent))


def test_a_body_that_is_too_large_however_it_is_sent(server: Running) -> None:
    large = json.dumps({"messages": [{"role": "user", "content": "x" * 5000}]}).encode()
    assert "at most 4000 bytes" in error(server.post(CHAT, large), 413)["message"]
    parts = (large[n : n + 1000] for n in range(0, len(large), 1000))
    chunked = server.http.post(CHAT, content=parts, headers={"content-type": "application/json"})
    assert error(chunked, 413)["code"] == "body_too_large"
    assert server.get("/health").status_code == 200


def test_a_prompt_longer_than_the_context(server: Running) -> None:
    long = [{"role": "user", "content": "word " * 100}]
    found = error(server.post(CHAT, {"messages": long}))
    assert "wanted less than the context of 64; shorten it or raise --max-context" in found["message"]


def test_other_paths_methods_and_types(server: Running) -> None:
    assert error(server.get("/v1/nothing"), 404)
    assert error(server.get(CHAT), 405)
    assert (
        "Content-Type: application/json" in error(server.post(CHAT, b"{}", content_type="text/plain"), 415)["message"]
    )
    assert server.get("/docs").status_code == 404


def test_no_page_of_another_origin_is_let_in(server: Running) -> None:
    """CORS is off: a browser's question whether it may is answered with no."""
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = server.http.options(CHAT, headers=asked)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "access-control-allow-origin" not in server.get("/v1/models", origin="http://evil.example").headers


def test_fields_that_ask_for_nothing_are_taken(server: Running) -> None:
    extra: dict[str, Any] = dict.fromkeys(IGNORED, "x") | {name: values[0] for name, values in NEUTRAL.items()}
    assert server.post(CHAT, ASK | OFF | extra | {"audio": None}).status_code == 200


def test_these_fields_are_listed_in_the_documents(root: Path) -> None:
    """Both lists, whole and in order, so that neither can grow in silence."""
    text = " ".join((root / "ARCHITECTURE.md").read_text(encoding="utf-8").split())
    assert f"are ignored: {', '.join(sorted(IGNORED))}. Fields" in text
    assert f"asks for nothing: {', '.join(sorted(NEUTRAL))}. All others" in text


def test_a_key_is_asked_for_everywhere_but_where_health_is_watched(llm: LLM) -> None:
    with running(llm, key="secret") as locked:
        assert [locked.get(path).status_code for path in ("/health", "/ready", "/version")] == [200] * 3
        for answer in (locked.get("/v1/models"), locked.get("/metrics"), locked.post(CHAT, ASK)):
            assert error(answer, 401)["type"] == "authentication_error"
        for wrong in ("Bearer secre", "Bearer secret2", "secret", "Bearer x", "Basic secret"):
            assert error(locked.get("/v1/models", authorization=wrong), 401)
        assert locked.client("secret").models.list().data[0].id == "pico"
        with pytest.raises(openai.AuthenticationError):
            locked.client("other").models.list()


def test_nothing_that_a_user_wrote_is_logged(
    server: Running,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not for good requests, not for bad ones, and not when the server itself fails with the text in its hands."""
    canary = "canary-7316"
    with caplog.at_level(logging.DEBUG, "dsv4"):
        server.post(CHAT, ASK | {"messages": [{"role": "user", "content": canary}]})
        error(server.post(CHAT, ASK | {canary: 1}))

        def fail(*_: object) -> None:
            raise ValueError(canary)

        monkeypatch.setattr("dsv4.server.app.chat_job", fail)
        found = error(server.post(CHAT, ASK), 500)
        assert canary not in str(found)
    until(lambda: "ValueError" in caplog.text)  # it was noticed
    out, err = capfd.readouterr()
    assert canary not in caplog.text + out + err


def test_what_users_write_is_logged_where_it_was_asked_for(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """A line of JSON for the prompt, as the model reads it, and one for each answer."""
    with running(llm, log_text=True) as server, caplog.at_level(logging.INFO, "dsv4.server.text"):
        said = server.post(CHAT, ASK | {"messages": [{"role": "user", "content": "canary-7316"}], "n": 2}).json()
    lines = [json.loads(record.message) for record in caplog.records if record.name == "dsv4.server.text"]
    assert "<｜User｜>canary-7316<｜Assistant｜>" in lines[0]["prompt"]
    answers = {line["choice"]: line for line in lines[1:]}
    assert [line["request"] for line in lines] == [said["id"].removeprefix("chatcmpl-")] * 3
    for choice in said["choices"]:
        text = choice["message"].get("reasoning_content", "") + (choice["message"]["content"] or "")
        assert answers[choice["index"]]["answer"].replace("</think>", "").startswith(text)
        assert answers[choice["index"]]["finish"] == "length"


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^cannot listen; got 127.0.0.1:{port}: .*; another program"):
            run.bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot listen"):
        run.bind("no.such.host.invalid", 0)
