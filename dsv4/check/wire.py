"""HTTP/1.1 and server-sent events over asyncio, as bare as a judge and a stopwatch of servers need them.

What a client library smooths over is what is judged here, and a library's own work would be timed with the server's.
Every request has a connection of its own, as those of many users have, and the time to connect is part of it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from dsv4.errors import RequestError

PATIENCE: Final = 600.0  # seconds that a whole answer may take
_LINE: Final = 1 << 20  # bytes of the longest line: a chunk's size, a header
_PIECE: Final = 1 << 16


class Broken(RequestError):
    """No answer, or half of one. `kind` is one word for it: connect, timeout, broken."""

    def __init__(self, kind: str, what: str, got: object = None, do: str | None = None) -> None:
        super().__init__(what, got=got, do=do)
        self.kind = kind


def base(url: str) -> str:
    """An address without its path behind the version: https://HOST/v1. RequestError for what is none."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise RequestError("the URL", got=repr(url), wanted="http://HOST:PORT or https://HOST, with or without /v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def words(body: bytes) -> str:
    """What a server says of an error, in one line of at most 300 characters, whatever shape it says it in."""
    text = body.decode(errors="replace")
    try:
        told = json.loads(text)
        told = told.get("error", told.get("detail", told)) if isinstance(told, dict) else told
        text = str(told.get("message", told) if isinstance(told, dict) else told)
    except (ValueError, RecursionError):
        pass
    return " ".join(text.split())[:300]


def data(line: bytes) -> bytes | None:
    """What a line of an event stream carries; None for comments, event names and blank lines."""
    name, _, value = line.strip().partition(b":")
    return value.strip() if name == b"data" else None


class Answer:
    """An HTTP answer whose body is still to be read, once. Names of `headers` are lower case."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self.headers, self._reader = status, headers, reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Broken if it ends too early."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await self._reader.readline()).split(b";")[0], 16):
                    yield await self._reader.readexactly(size)
                    await self._reader.readline()
            else:
                length = self.headers.get("content-length")
                left = 1 << 62 if length is None else int(length)
                while left and (piece := await self._reader.read(min(left, _PIECE))):
                    left -= len(piece)
                    yield piece
                if left and length is not None:
                    raise Broken("broken", "the body ends too early", got=f"{left} bytes too few")
        except (OSError, EOFError, ValueError) as error:
            raise Broken("broken", "the connection broke off", got=f"{type(error).__name__}: {error}") from None

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.pieces()])

    async def lines(self) -> AsyncIterator[bytes]:
        """The body's lines without their ends, each as soon as it is whole; what has no end comes last."""
        rest = b""
        async for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line.removesuffix(b"\r")
        if rest:
            yield rest


class Client:
    """Sends requests to one server. `root` is its address without a path, `base` the one that its /models is under."""

    def __init__(self, url: str, key: str | None = None, patience: float = PATIENCE) -> None:
        self.base, self.key, self.patience = base(url), key, patience
        parts = urllib.parse.urlsplit(self.base)
        self._host, self._netloc, self._path = parts.hostname or "", parts.netloc.rpartition("@")[2], parts.path
        self.root = f"{parts.scheme}://{parts.netloc}"
        try:
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise RequestError("the URL", got=repr(url), wanted=str(error)) from None
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None

    @asynccontextmanager
    async def open(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Answer]:
        """One request; the connection closes with the block. `path`: under /v1 if it begins with a slash, else "=/..."
        is as it stands. Broken where no answer comes.
        """
        reader, writer = await self._connected()
        late = Broken("timeout", "the answer takes too long", got=f"more than {self.patience:g} s")
        timer = asyncio.get_running_loop().call_later(self.patience, reader.set_exception, late)
        try:
            writer.write(self._head(method, path, body, headers or {}) + (body or b""))
            status, named = await _answered(reader)
            yield Answer(status, named, reader)
        finally:
            timer.cancel()
            writer.close()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            opening = asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=_LINE)
            return await asyncio.wait_for(opening, self.patience)
        except (OSError, asyncio.TimeoutError) as error:
            raise Broken("connect", f"{self.root} cannot be reached", got=error, do="is it running?") from None

    def _head(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
        target = path[1:] if path.startswith("=") else self._path + path
        named = {"Host": self._netloc, "Accept": "*/*", "Connection": "close"}
        if body is not None:
            named |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if self.key:
            named["Authorization"] = f"Bearer {self.key}"
        named |= headers
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items() if value)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        async with self.open("GET", path) as answer:
            return answer.status, await answer.read()

    async def first_model(self) -> str:
        """The first that the server lists. RequestError if it lists none."""
        status, body = await self.get("/models")
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            got = f"{status} {words(body)}"
            raise RequestError(f"{self.base} lists no model", got=got, do="name one: --model NAME") from None


async def _answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, behind all that only say that an answer will come."""
    try:
        status = 100
        while 100 <= status < 200:
            line = await reader.readline()
            status = int(line.split()[1])
            headers: dict[str, str] = {}
            while (line := await reader.readline()).strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
        return status, headers
    except (OSError, ValueError, IndexError) as error:
        raise Broken("broken", "no answer came", got=f"{type(error).__name__}: {error}") from None
