"""Answers as they come (server-sent events) or whole; a client that leaves ends its requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dsv4.chat.events import Event
from dsv4.errors import DSV4Error
from dsv4.server.choice import Choice
from dsv4.server.refusal import body, refused
from dsv4.server.shapes import Head, Json, again, chunks, first_chunk, usage
from dsv4.server.worker import Reading, Worker


class EventStream(StreamingResponse):
    """A stream of `events`. However it ends, and be it before it began, its requests end with it."""

    def __init__(self, worker: Worker, reading: Reading, events: AsyncIterator[str]) -> None:
        self._worker, self._reading = worker, reading
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. With a deadline not before the first token: what never began is refused with a status of its own."""
        try:
            if self._reading.seconds is None or await _unless_gone(receive, self._reading.arrival()):
                await super().__call__(scope, receive, send)
        finally:
            self._worker.close(self._reading)


def _line(said: Json) -> str:
    return f"data: {json.dumps(said, ensure_ascii=False, separators=(',', ':'))}\n\n"


def named(said: Json) -> str:
    """An event that bears its type as its name too."""
    return f"event: {said['type']}\n{_line(said)}"


async def pushed(reading: Reading, choices: Sequence[Choice]) -> AsyncIterator[tuple[Choice, list[Event]]]:
    """What comes, until all have ended: a choice, and the events that its next delta makes certain."""
    while any(choice.finish is None for choice in choices):
        for place, delta in await reading.next():
            if choices[place].finish is None:
                yield choices[place], choices[place].push(delta)


async def chunk_events(
    reading: Reading, head: Head, choices: Sequence[Choice], prompt_tokens: int, counts: bool
) -> AsyncIterator[str]:
    """The stream as OpenAI has it, with token counts at its end if `counts`."""
    yield "".join(_line(chunk) for choice in choices for chunk in first_chunk(head, choice))
    try:
        async for choice, events in pushed(reading, choices):
            for chunk in chunks(head, choice, events):
                yield _line(chunk)
    except DSV4Error as error:  # the status line is long gone: the clients look for this key
        yield _line(body(refused(error)))
        return
    if counts:
        yield _line(head.wrap([]) | {"usage": usage(choices, prompt_tokens)} | again(choices))
    yield "data: [DONE]\n\n"


async def whole(
    request: Request, worker: Worker, reading: Reading, coming: AsyncIterator[object], said: Callable[[], Json]
) -> Response:
    """What is `said` of the answer when all that is `coming` has come. Raises what ended it early."""
    try:
        if not await _unless_gone(request.receive, _all(coming)):
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(said())
    finally:
        worker.close(reading)


async def _all(coming: AsyncIterator[object]) -> None:
    async for _ in coming:
        pass


async def _unless_gone(receive: Receive, doing: Coroutine[Any, Any, None]) -> bool:
    """Whether it came to its end before the client went away. Raises what it raises."""
    work, leaving = asyncio.ensure_future(doing), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        return work.done()
    finally:
        work.cancel()
        leaving.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
