"""A hub of models on 127.0.0.1, of the few pages that a download asks for, which can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/?]+)")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Asked(NamedTuple):
    """A request that came."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Hub:
    """`repos`: name → path → content. What is set below happens as often as its number says."""

    repos: dict[str, dict[str, bytes]]
    url: str = ""
    token: str | None = None  # without it 401
    gated: bool = False
    drops: Counter[str] = field(default_factory=Counter)  # the connection ends in the middle of this file
    wrong: Counter[str] = field(default_factory=Counter)  # one byte of this file is another
    down: Counter[str] = field(default_factory=Counter)  # 503 for this file
    stalls: Counter[str] = field(default_factory=Counter)  # half of this file, then nothing until `over`
    over: threading.Event = field(default_factory=threading.Event)
    asked: list[Asked] = field(default_factory=list)

    def fetched(self, path: str) -> list[Asked]:
        """Downloads of one file."""
        return [asked for asked in self.asked if asked.method == "GET" and asked.path.endswith("/" + path)]

    def listing(self, repo: str) -> list[dict[str, Any]]:
        """The tree: weights by SHA-256, everything else by git's hash."""
        return [_entry(path, content) for path, content in self.repos[repo].items()]


def _entry(path: str, content: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": git}
    if path.endswith((".safetensors", ".bin")):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


@contextmanager
def stand_in(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    """Serves until the block ends."""
    hub = Hub({name: dict(files) for name, files in repos.items()})
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        authorization = self.headers.get("Authorization")
        self.hub.asked.append(Asked(self.command, self.path, self.headers.get("Range"), authorization))
        page, file = PAGE.match(self.path), FILE.match(self.path)
        found = page or file
        if self.hub.token is not None and authorization != f"Bearer {self.hub.token}":
            self._send(401, {"error": "Invalid username or password."})
        elif found is None or found["repo"] not in self.hub.repos:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif self.hub.gated and file:
            self._send(403, {"error": "ask"}, {"X-Error-Code": "GatedRepo"})
        elif found["revision"] not in ("main", "v1", COMMIT):
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif page and page["what"] == "revision":
            self._send(200, {"id": page["repo"], "sha": COMMIT, "siblings": [], "tags": []})
        elif page:
            self._send(200, self.hub.listing(page["repo"]))
        elif file:
            self._file(file["repo"], file["path"])

    def _file(self, repo: str, path: str) -> None:
        content = self.hub.repos[repo][path]
        entry = _entry(path, content)
        get = self.command == "GET"
        if get and self.hub.down[path]:
            self.hub.down[path] -= 1
            self._send(503, {"error": "later"})
            return
        if get and self.hub.wrong[path]:
            self.hub.wrong[path] -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        cut = get and (self.hub.drops[path] > 0 or self.hub.stalls[path] > 0)
        self._send(206 if start else 200, body, headers, len(body) // 2 if cut else None)
        if get and self.hub.stalls[path]:
            self.hub.over.wait(60)
        elif cut:
            self.hub.drops[path] -= 1

    def _send(
        self, status: int, body: object, headers: Mapping[str, str] | None = None, cut: int | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True
