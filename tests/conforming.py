"""What tests of `dsv4 conform` share: an application that answers wrongly, and the verdict on one case of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from dsv4.check.conform.cases import CASES
from dsv4.check.conform.run import Asking, Verdict
from dsv4.check.wire import Client
from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests import PICO
from tests.serving import Running, dictated, running
from tests.test_server_tools import PARIS, block, invoke, parameter

KEY = "a key"
SAID = "hé</think>Schön, 你好." + block(PARIS, invoke(parameter("city", "Rome")))
Change = Callable[[bytes], bytes]


@contextmanager
def speaker() -> Iterator[Running]:
    """A server that says SAID to everybody who has the key."""
    llm = LLM.load(PICO, EngineOptions(max_sequences=4, max_context=2048, draft_tokens=0, reuse_points=0))
    with dictated(llm, SAID), running(llm, key=KEY) as server:
        yield server


@contextmanager
def thinker() -> Iterator[Running]:
    """A server of a small model that says what it likes, and can be held to what others like."""
    with running(LLM.load(PICO, EngineOptions(max_sequences=2, max_context=2048)), key=KEY) as server:
        yield server


class Faulty:
    """An ASGI application in front of which requests are changed on their way in, or answers on their way out."""

    def __init__(
        self,
        app: Any,
        body: Change = bytes,
        start: Callable[[dict[str, Any]], None] = lambda _: None,
        asked: Any = None,
    ) -> None:
        self._app, self._body, self._start, self._asked = app, body, start, asked

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        whole, begun = b"", {}

        async def keep(message: Any) -> None:
            nonlocal whole, begun
            if message["type"] == "http.response.start":
                begun = message
                return
            whole += message.get("body", b"")
            if not message.get("more_body"):
                begun["headers"] = [(name, value) for name, value in begun["headers"] if name != b"content-length"]
                self._start(begun)
                await send(begun)
                await send({"type": "http.response.body", "body": self._body(whole)})

        async def changed() -> Any:
            """The whole request in one piece, then what comes after it."""
            nonlocal read
            if read:
                return await receive()
            body, read, more = b"", True, True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            return message | {"body": self._asked(body) if body else body, "more_body": False}

        read = False
        await self._app(scope, changed if self._asked else receive, keep)


def with_fault(server: Running, case: str, **changes: Any) -> Verdict:
    """The verdict on a case by its name, with `Faulty` before the server."""
    config = server.server.config
    app, judged = config.loaded_app, next(one for one in CASES if one.name == case)
    config.loaded_app = Faulty(app, **changes)
    try:
        return asyncio.run(Asking(Client(server.url, KEY, 60), "pico").judged(judged))
    finally:
        config.loaded_app = app


@cache
def passes(server: Running, case: str) -> bool:
    """Whether the case passes without a fault; asked once, for all faults that it has to catch."""
    return with_fault(server, case).verdict == "pass"


def caught(server: Running, case: str, **changes: Any) -> None:
    """The case passes, and with this fault it fails and says what came and what should have come."""
    assert passes(server, case)
    found = with_fault(server, case, **changes)
    assert (found.verdict, bool(found.got), bool(found.wanted)) == ("FAIL", True, True)


def swap(old: str, new: str) -> Change:
    return lambda body: body.replace(old.encode(), new.encode())


def other_name(old: str) -> Change:
    return swap(f'"{old}":', f'"not_{old}":')


def asking(**fields: Any) -> Callable[[bytes], bytes]:
    """A server that reads other values in these fields than were sent, and none where they are None."""

    def changed(body: bytes) -> bytes:
        try:
            sent = json.loads(body)
        except ValueError:
            return body
        return json.dumps({name: value for name, value in (sent | fields).items() if value is not None}).encode()

    return changed


def breaking(good: int) -> Callable[[dict[str, Any]], None]:
    """A server that gives so many answers and then none."""
    left = [good]

    def start(message: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] < 0:
            message["status"] = 500

    return start


def events(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Change:
    """Change the events of a stream, which bear their types as their names; whole answers stay as they are."""

    def changed(body: bytes) -> bytes:
        if not body.startswith(b"event:"):
            return body
        said = [json.loads(event.partition("data: ")[2]) for event in body.decode().strip().split("\n\n")]
        lines = [f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in change(said)]
        return "".join(lines).encode()

    return changed


def whole(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the object of a whole answer in its place; streams stay as they are."""

    def changed(body: bytes) -> bytes:
        if not body.startswith(b"{"):
            return body
        tree = json.loads(body)
        change(tree)
        return json.dumps(tree).encode()

    return changed
