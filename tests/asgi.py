"""Clients at the other end of ASGI, where what is on its way lies in nobody's buffers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from dsv4.server.app import Service
from tests.serving import ENDLESS, FRANCE, OFF, STORY, Running

CHAT = "/v1/chat/completions"
SCOPE = {
    "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST", "path": CHAT,
    "headers": [(b"content-type", b"application/json")], "query_string": b"", "http_version": "1.1",
}  # fmt: skip
SHORT = {"messages": FRANCE, "stream": True} | OFF
LONG = {"messages": STORY, "max_tokens": 200, "stream": True, "logit_bias": ENDLESS} | OFF


def idle(server: Running) -> bool:
    return not server.service.llm.engine.busy and server.service.worker.live == 0


class Slow:
    """A client at the other end of ASGI that takes nothing more until it is let."""

    def __init__(self) -> None:
        self.go, self.begun = asyncio.Event(), asyncio.Event()
        self.body = b""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.begun.set()
            await self.go.wait()
            self.body += message.get("body", b"")

    def text(self) -> str:
        return self.body.decode()


async def asked(service: Service, sent: Any, send: Any, then: Any = None) -> None:
    body = json.dumps(sent).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await (then or asyncio.Event().wait)()

    await service.app(SCOPE, receive, send)


class Leaving(Slow):
    """And one that goes away while it takes nothing."""

    async def receive(self) -> Any:
        await self.go.wait()
        return {"type": "http.disconnect"}


async def until_there(service: Service) -> list[Any]:
    while not service.worker._clients:
        await asyncio.sleep(0.01)
    return list(service.worker._clients.values())


def content(stream: str) -> str:
    lines = [line[6:] for line in stream.split("\n\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line).get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
