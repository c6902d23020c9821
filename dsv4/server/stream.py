"""Answers as they come (server-sent events) or whole; a client that leaves ends its requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dsv4.errors import DSV4Error
from dsv4.server.choice import Choice
from dsv4.server.refusal import body, refused
from dsv4.server.shapes import Head, Json, again, chunks, first_chunk, usage, whole_answer
from dsv4.server.worker import Reading, Worker


class EventStream(StreamingResponse):
    """A stream of chunks. However it ends, and be it before it began, its requests end with it."""

    def __init__(
        self, worker: Worker, reading: Reading, head: Head, choices: Sequence[Choice], prompt_tokens: int, counts: bool
    ) -> None:
        self._worker, self._reading = worker, reading
        events = _events(reading, head, choices, prompt_tokens, counts)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.close(self._reading)


def _line(said: Json) -> str:
    return f"data: {json.dumps(said, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _events(
    reading: Reading, head: Head, choices: Sequence[Choice], prompt_tokens: int, counts: bool
) -> AsyncIterator[str]:
    yield "".join(_line(chunk) for choice in choices for chunk in first_chunk(head, choice))
    try:
        while any(choice.finish is None for choice in choices):
            for place, delta in await reading.next():
                choice = choices[place]
                if choice.finish is None:
                    for chunk in chunks(head, choice, choice.push(delta)):
                        yield _line(chunk)
    except DSV4Error as error:  # the status line is long gone: the clients look for this key
        yield _line(body(refused(error)))
        return
    if counts:
        yield _line(head.wrap([]) | {"usage": usage(choices, prompt_tokens)} | again(choices))
    yield "data: [DONE]\n\n"


async def whole(
    request: Request, worker: Worker, reading: Reading, head: Head, choices: Sequence[Choice], prompt_tokens: int
) -> Response:
    """The answer when it is complete. Raises what ended it early."""
    collecting = asyncio.ensure_future(_collect(reading, choices))
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody reads it
        collecting.result()
        return JSONResponse(whole_answer(head, choices, prompt_tokens))
    finally:
        collecting.cancel()
        leaving.cancel()
        worker.close(reading)


async def _collect(reading: Reading, choices: Sequence[Choice]) -> None:
    while any(choice.finish is None for choice in choices):
        for place, delta in await reading.next():
            choices[place].push(delta)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
