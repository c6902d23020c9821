"""`dsv4 chat --url` against a server on 127.0.0.1 that answers, refuses, breaks off and hangs."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4.cli.main import main
from tests.chat_server import USAGE, Server, piece, serving
from tests.terminal import Terminal


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as here:
        yield here


def through(server: Server, capsys: pytest.CaptureFixture[str], text: str, *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(text))
        with pytest.raises(SystemExit) as stop:
            main(["chat", "--url", server.url, "--quiet", *arguments])
    return (int(stop.value.code or 0), *capsys.readouterr())


def test_a_server_answers(server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n", encoding="utf-8")
    text = "/system Be brief.\na\n/nothink\n/effort max\nb\n"
    code, out, err = through(server, capsys, text, "--key-file", str(key))
    assert (code, out) == (0, "It is so.\n" * 2)
    assert "hm" in err
    assert "7 + 5 tokens" in err
    first, second = server.asked
    assert first["model"] == "first"
    assert [message["content"] for message in second["messages"]] == ["Be brief.", "a", "It is so.", "b"]
    assert not {"thinking", "seed", "max_tokens"} & set(first)  # what nobody asked for is the server's to choose
    assert second["thinking"] == {"type": "disabled"}
    assert second["chat_template_kwargs"] == {"thinking": False}
    assert second["reasoning_effort"] == "max"
    assert server.keys == ["Bearer secret"] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"status": 400, "error": {"message": "maximum context length is 9"}},
            "length is 9; the conversation is too long: /clear",
        ),
        ({"status": 401, "error": "no"}, "--key-file"),
        ({"status": 500, "error": None}, "500"),
        ({"status": 302, "location": "http://127.0.0.1:1/"}, "302"),
        ({"chunks": [piece(content="It"), {"error": {"message": "out of memory"}}]}, "out of memory"),
        ({"chunks": [piece(content="It"), b"data: {\n\n"]}, "no chat completion"),
        ({"chunks": [b"data: []\n\n"]}, "no chat completion"),
        ({"models": []}, "lists no model"),
    ],
)
def test_a_refusal_is_one_line(
    change: dict[str, Any], words: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    code, _, err = through(server, capsys, "a\n")
    assert code == 1
    assert words in err
    assert err.count("dsv4: ") == 1
    assert err.splitlines()[-1].startswith("dsv4: ")


def test_comments_other_names_and_a_missing_usage_do_no_harm(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.chunks = [b": ping\n\n", piece(reasoning="mm"), b"event: x\n", piece("stop", content="Yes"), {"choices": []}]
    code, out, err = through(server, capsys, "a\n", "second")
    assert (code, out) == (0, "Yes\n")
    assert "mm" in err
    assert server.asked[0]["model"] == "second"


def test_a_script_talks_through_a_pipe(server: Server) -> None:
    """A process of its own: bytes that are no UTF-8 pass, and the exit code tells of the wrong command."""
    command = [sys.executable, "-m", "dsv4.cli.main", "chat", "--quiet", "--url", server.url]
    script = b"a\xff\r\n/nonsense\n\n /usr\nb\\"
    done = subprocess.run(command, input=script, capture_output=True, check=False, timeout=120)
    assert (done.stdout, done.returncode) == (b"It is so.\n" * 3, 1)
    assert b"Traceback" not in done.stderr
    said = [message["content"] for message in server.asked[-1]["messages"]]
    assert said[::2] == ["a\ufffd", " /usr", "b"]


def test_a_conversation_at_a_terminal(server: Server) -> None:
    """Several lines in both ways, an answer kept, Ctrl-C at a server that says nothing more, Ctrl-D in the end."""
    with Terminal("--url", server.url) as at:
        at.expect("> ")
        at.type('"""\n')
        at.expect("… ")
        at.type("one\n")
        at.expect("… ")
        at.type('two"""\n')
        assert "It is so." in at.expect("tokens/s.*> ")
        server.hang, server.chunks = threading.Event(), [piece(content="It is"), USAGE]
        at.type("three\\\n")
        at.expect("… ")
        at.type("four\n")
        at.expect("It is")
        at.type("\x03")
        at.expect("ended by Ctrl-C.*> ")
        at.type("\x04")
        assert at.process.wait(60) == 0
    said = [message["content"] for message in server.asked[-1]["messages"]]
    assert said == ["one\ntwo", "It is so.", "three\nfour"]
