"""What stands before every endpoint: the key, the size of a body, and a last word for what we did not foresee."""

from __future__ import annotations

import hmac
import logging
import traceback

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv4.server.options import ServerOptions
from dsv4.server.refusal import Refusal, body
from dsv4.server.static import FILES

log = logging.getLogger("dsv4.server")

OPEN = {"/health", "/ready", "/version", *FILES}  # for those who watch the server, and for those who will type a key


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            refusal = self._refused(scope, headers)
            if refusal is not None:
                await JSONResponse(body(refusal, scope["path"]), refusal.status, refusal.headers)(scope, receive, send)
            else:
                await self._app(scope, self._limited(receive), send)
        except ClientDisconnect:  # with its request half sent: there is nobody to tell
            return
        except Exception as error:  # the endpoint has answered 500 already, where it still could
            frames = "".join(traceback.format_tb(error.__traceback__))  # no message: it may quote a user
            log.error("a request failed: %s\n%s", type(error).__name__, frames)

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> Refusal | None:
        key = self._options.key
        if key is not None and scope["path"] not in OPEN:
            right = {b"authorization": b"Bearer " + key.encode(), b"x-api-key": key.encode()}
            if not any(hmac.compare_digest(headers.get(name, b""), value) for name, value in right.items()):
                do = "send the header Authorization: Bearer KEY, or x-api-key: KEY"
                return Refusal("the API key is wrong or missing", status=401, code="invalid_api_key", do=do)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._options.body:
            return _too_large(self._options.body)
        # A page in a browser may send a form to any address, but JSON only where it is let; ours lets nobody.
        kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            got, do = kind.decode("latin-1")[:60], "send the header Content-Type: application/json"
            return Refusal("the body is no JSON", status=415, got=got, wanted="application/json", do=do)
        return None

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts: a body need not say how long it is."""
        seen = 0

        async def counting() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._options.body:
                raise _too_large(self._options.body)
            return message

        return counting


def _too_large(limit: int) -> Refusal:
    return Refusal("the body is too large", status=413, code="body_too_large", wanted=f"at most {limit} bytes")
