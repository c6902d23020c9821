"""`dsv4 serve` as a program: what it says, who may come in, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import pytest

from dsv4.cli.main import main
from tests.serving import ENDLESS, FRANCE, OFF

KEY = "key-2291"


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its URL and its start screen."""
    command = [sys.executable, "-m", "dsv4.cli.main", "serve", "--port", "0", *options]
    environment = {**os.environ, "DSV4_API_KEY": KEY}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        screen = start_screen(process.stderr)
        yield process, screen.partition("http://")[2].partition("/v1")[0], screen
    finally:
        process.kill()
        process.wait(30)


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
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read().splitlines() == ["stopped"]


def wait_for(client: httpx.Client, url: str) -> None:
    """The address is bound before it is listened at: at most a few tries until it is."""
    for _ in range(200):
        try:
            assert client.get(url + "/models").status_code == 200
            return
        except httpx.ConnectError:
            time.sleep(0.05)
    raise AssertionError("it does not listen")


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
                assert process.wait(20) == 0


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
