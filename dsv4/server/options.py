"""How to serve: the decisions that do not concern the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """`names`: what clients may call the model, the first in answers. `key`: what they must show, None for nothing.

    `queue`: requests that may wait for a place. `unread`: tokens that one client may leave unread before its requests
    pause; `stall`: seconds of such a pause after which they end. `deadline`: seconds from acceptance after which any
    request ends, None for never. `step_limit`: seconds of one step of the engine after which /health tells that it
    hangs, 0 for never. `body`: largest request in bytes. `drain`: seconds that running answers have when the server is
    told to stop. `log_text`: write what users ask and what they are answered into the log, which is never done unasked.
    """

    names: tuple[str, ...]
    key: str | None = None
    queue: int = 64
    unread: int = 1024
    stall: float = 60.0
    deadline: float | None = None
    step_limit: float = 120.0
    body: int = 16 << 20
    drain: int = 30
    log_text: bool = False
