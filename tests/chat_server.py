"""A server on 127.0.0.1 that speaks just enough of OpenAI's chat completions, as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def piece(finish: str | None = None, **delta: str) -> dict[str, Any]:
    """One chunk of an answer."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
GOOD = [
    piece(role="assistant"),
    piece(reasoning_content="hm"),
    piece(content="It is "),
    piece("stop", content="so."),
    USAGE,
]


@dataclass
class Server:
    """`chunks`: what every answer streams; bytes go out as they are. `status`: other than 200 refuses with `error`."""

    url: str = ""
    chunks: list[Any] = field(default_factory=lambda: list(GOOD))
    status: int = 200
    error: Any = None
    location: str = ""
    models: list[str] = field(default_factory=lambda: ["first", "second"])
    hang: threading.Event | None = None  # after the chunks: waits for this
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Server]:
    """Serves until the block ends."""
    server = Server()
    handler = type("Handler", (_Handler,), {"told": server})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    listening.daemon_threads = True
    server.url = f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        if server.hang:
            server.hang.set()
        listening.shutdown()
        listening.server_close()


class _Handler(BaseHTTPRequestHandler):
    told: Server

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": name} for name in self.told.models]}).encode())

    def do_POST(self) -> None:
        told = self.told
        told.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        told.keys.append(self.headers.get("Authorization"))
        if self.path != "/v1/chat/completions":
            self._send(404, b"no such page")
        elif told.status != 200:
            self._send(told.status, json.dumps({"error": told.error}).encode())
        else:
            self._send(200, b"")
            for chunk in told.chunks:
                self.wfile.write(
                    chunk if isinstance(chunk, bytes) else b"data: " + json.dumps(chunk).encode() + b"\n\n"
                )
                self.wfile.flush()
            if told.hang:
                told.hang.wait(120)
            self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if self.told.location:
            self.send_header("Location", self.told.location)
        self.end_headers()
        self.wfile.write(body)
