"""`dsv4 serve` as a program: what it says, who may come in, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from dsv4.cli.interrupt import ctrl_c
from dsv4.cli.main import main
from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests.serving import ENDLESS, FRANCE, OFF, STORY, gated, running, until

KEY = "key-2291"


@contextmanager
def serving(*options: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its URL and its start screen."""
    command = [sys.executable, "-m", "dsv4.cli.main", "serve", "--port", str(port), *options]
    environment = {**os.environ, "DSV4_API_KEY": KEY}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        screen = start_screen(process.stderr)
        yield process, screen.partition("http://")[2].partition("/v1")[0], screen
    finally:
        process.kill()
        process.wait(60)


def start_screen(stderr: IO[str]) -> str:
    lines = []
    for line in stderr:
        lines.append(line)
        if line.startswith("listening on"):
            return "".join(lines)
    raise AssertionError("".join(lines))


def test_it_says_what_it_serves_and_drains_when_it_is_told_to_end() -> None:
    with serving("--max-context", "128", "--max-sequences", "3", "--served-model-name", "small") as (
        process,
        at,
        screen,
    ):
        for said in ("linears fp8, experts mxfp4", "128 positions, 3 sequences", "3 requests at once", "as small", KEY):
            assert (said in screen) == (said != KEY)
        for said in ("cache ", "draft ", "numerics ", "for those who have the key"):
            assert said in screen
        url, headers = f"http://{at}/v1", {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(headers=headers, timeout=60) as client:
            wait_for(client, url)
            assert httpx.get(url + "/models").status_code == 401
            with client.stream("POST", url + "/chat/completions", json={"messages": FRANCE, "stream": True}) as answer:
                lines = answer.iter_lines()
                assert "assistant" in next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert '"finish_reason":"stop"' in "".join(rest)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read().splitlines() == ["stopped"]


def wait_for(client: httpx.Client, url: str) -> None:
    """The address is bound before it is listened at: at most a few tries until it is."""

    def listens() -> bool:
        with contextlib.suppress(httpx.ConnectError):
            return client.get(url + "/models").status_code == 200
        return False

    until(listens)


@pytest.mark.slow
def test_a_second_signal_does_not_wait() -> None:
    with serving("--max-context", "4000", "--drain", "600") as (process, at, _):
        sent = {"messages": FRANCE, "stream": True, "logit_bias": ENDLESS} | OFF
        with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
            wait_for(client, f"http://{at}/v1")
            with client.stream("POST", f"http://{at}/v1/chat/completions", json=sent) as answer:
                lines = answer.iter_lines()  # if it is dropped, so is the connection
                next(lines)
                process.send_signal(signal.SIGTERM)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(1)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0


# --- killed --------------------------------------------------------------------------------------------------------

READER = """
import socket, sys
line = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
line.sendall(sys.stdin.buffer.read())
while b"assistant" not in line.recv(4096): pass
print("reads", flush=True)
while True: line.recv(4096)
"""


def test_a_client_that_is_killed_ends_its_request() -> None:
    """SIGKILL in the middle of a stream: its slot is free before the next step."""
    llm = LLM.load(options=EngineOptions(max_sequences=1, max_context=256))
    with running(llm) as server:
        asked = {"messages": STORY, "max_tokens": 200, "stream": True, "logit_bias": ENDLESS} | OFF
        sent = server.http.build_request("POST", "/v1/chat/completions", json=asked)
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.headers.items())
        with gated(llm):
            port = str(server.http.base_url.port)
            client = subprocess.Popen(
                [sys.executable, "-c", READER, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            try:
                assert client.stdin is not None
                assert client.stdout is not None
                client.stdin.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + sent.content)
                client.stdin.close()
                assert client.stdout.readline() == b"reads\n"
            finally:
                client.kill()
                client.wait(60)
                client.stdout.close()
            until(lambda: server.ended("cancelled") == 1)
        until(lambda: server.service.worker.live == 0 and not llm.engine.busy)
        answer = server.post("/v1/chat/completions", {"messages": FRANCE} | OFF)
        assert answer.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle of a stream: its client has a broken connection, and the next has the port at once."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        with serving("--max-context", "4000") as (process, at, _):
            wait_for(client, f"http://{at}/v1")
            sent = {"messages": FRANCE, "stream": True, "logit_bias": ENDLESS} | OFF
            with client.stream("POST", f"http://{at}/v1/chat/completions", json=sent) as answer:
                lines = answer.iter_lines()
                assert "assistant" in next(lines)
                process.kill()
                with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                    list(lines)
            process.wait(60)
        assert list(tmp_path.iterdir()) == []
        port = int(at.rpartition(":")[2])
        with serving("--max-context", "64", port=port) as (_, again, _):
            assert again == at
            wait_for(client, f"http://{at}/v1")


SWALLOWS = """
import time
try:
    print("loading", flush=True)
    for _ in range(600): time.sleep(0.1)
except BaseException:
    pass
"""
STARTS = """
import signal
signal.signal(signal.SIGINT, {before})
from dsv4.cli.interrupt import ctrl_c
with ctrl_c():
    {work}
print("went on")
"""


@pytest.mark.parametrize(
    ("before", "work", "code", "rest"),
    [
        ("signal.default_int_handler", "import swallows", 130, ""),
        ("signal.default_int_handler", "exec(open('swallows.py').read())", 0, "went on\n"),
        ("lambda *_: exit(7)", "exec(open('swallows.py').read().replace('Base', ''))", 7, ""),
    ],
)
def test_ctrl_c_is_not_lost_in_a_library_that_swallows_it(
    before: str, work: str, code: int, rest: str, tmp_path: Path, root: Path
) -> None:
    """While something is imported it ends the process; elsewhere it is the exception that it always was."""
    (tmp_path / "swallows.py").write_text(SWALLOWS, encoding="utf-8")
    script, environment = STARTS.format(before=before, work=work), {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == rest
        assert process.wait(60) == code
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_ctrl_c_that_is_somebody_elses_stays_so(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with ctrl_c():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "8000", "/models/none"], "does not exist"),
        (["--api-key", "a b"], "the API key; wanted printable ASCII"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
        (["--max-context", "0"], "max_context"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--port", "0", *options])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_without_its_libraries_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dsv4.cli.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(SystemExit):
        main(["serve"])
    assert capsys.readouterr().err == "dsv4: dsv4 serve needs uvicorn; pip install 'dsv4[server]'\n"


def test_nothing_but_a_server_loads_its_libraries() -> None:
    script = "import sys, dsv4.cli.main; print({'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "set()"
