"""The page at /: a chat in the browser. It holds no secret and needs no key; what it asks the API does."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).with_name("page")
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# path: file. The page names the others, and the API, relative to itself: it works below a proxy's prefix too.
FILES = {
    "/" if file.name == "index.html" else f"/page/{file.name}": file
    for file in sorted(FOLDER.iterdir())
    if file.suffix in _KINDS
}
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",  # no other page may show this one and have it clicked
    "require-trusted-types-for 'script'",  # no text becomes markup, whatever a script tries
    "trusted-types 'none'",
)
_HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # to be asked for again each time: a newer server has a newer page at once
}


def served(file: Path) -> Callable[[Request], Awaitable[Response]]:
    """What answers with `file` as it is now, and with 304 those who have it."""
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'

    async def answer(request: Request) -> Response:
        headers = _HEADERS | {"ETag": tag}
        if tag in request.headers.get("if-none-match", ""):  # in a list, or behind the W/ of a proxy that compresses
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_KINDS[file.suffix])

    return answer
